//! Which contrast a series is, and which series of a study stand for which: by their tags, and by their words last.

use serde::{Deserialize, Serialize};

use crate::study::{MrAcquisition, Uid};

/// The four contrasts of the exam, in the order of its network's channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Contrast {
    /// T1-weighted.
    T1,
    /// T1-weighted after contrast agent.
    T1c,
    /// T2-weighted.
    T2,
    /// T2-weighted, fluid suppressed.
    #[serde(rename = "FLAIR")]
    Flair,
}

impl Contrast {
    /// All, in the order of the channels.
    pub const ALL: [Self; 4] = [Self::T1, Self::T1c, Self::T2, Self::Flair];

    /// As manifests and reports have it: `T1`, `T1c`, `T2`, `FLAIR`.
    pub fn name(self) -> &'static str {
        match self {
            Self::T1 => "T1",
            Self::T1c => "T1c",
            Self::T2 => "T2",
            Self::Flair => "FLAIR",
        }
    }

    /// The contrast somebody means by a word: `t1`, `T1c`, `t1ce`, `t1gd`, `t2`, `flair`.
    pub fn of_word(word: &str) -> Option<Self> {
        match word.to_ascii_lowercase().as_str() {
            "t1" | "t1w" | "t1n" => Some(Self::T1),
            "t1c" | "t1ce" | "t1gd" | "t1gad" | "t1km" => Some(Self::T1c),
            "t2" | "t2w" => Some(Self::T2),
            "flair" | "t2f" | "t2flair" => Some(Self::Flair),
            _ => None,
        }
    }
}

/// Why a series is none of the four.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAContrast(pub &'static str);

// Milliseconds. The bounds are wide: spin echo and turbo spin echo from 0.2 to 7 T lie inside, and between them is nothing
// that the exam could use (Bernstein, King, Zhou, Handbook of MRI Pulse Sequences, 2004).
const ECHO_SHORT: f64 = 35.0;
const ECHO_LONG: f64 = 60.0;
const REPETITION_LONG: f64 = 1800.0;
/// Single-shot turbo spin echo counts the repetition from slice to slice; no T1-weighted image has so long an echo.
const REPETITION_SINGLE_SHOT: f64 = 600.0;
/// With a long echo, inversions from here on null fluid (1650 at a short repetition to 2800 at a long one; low fields lie below).
const INVERSION_OF_FLUID: f64 = 1200.0;
/// T1-weighted inversion recovery lies below (MPRAGE at 7 T has 1300); the second image of MP2RAGE (2500) above is none.
const INVERSION_OF_T1: f64 = 1500.0;
/// Fat is nulled at 120 to 250.
const INVERSION_OF_FAT: f64 = 300.0;
/// Fluid cannot be nulled at shorter repetitions.
const REPETITION_OF_FLUID: f64 = 4000.0;
/// Gradient echoes repeated as fast as this may be a T1-weighted volume or show flowing blood; the numbers alone do not tell.
const REPETITION_OF_FLOW: f64 = 60.0;

/// Values of Image Type that name diffusion and perfusion, and what is computed from them.
const MAPS_OF_MOTION: &[&str] = &[
    "DIFFUSION", "ADC", "EADC", "EXP", "FA", "TRACEW", "TENSOR", "TENSOR_B0", "PERFUSION", "ASL", "CBF", "CBV", "RCBF", "RCBV", "MTT",
    "TTP", "TMAX", "RELCBF", "RELCBV", "RELMTT", "FMRI", "MOCO_BOLD",
];
/// Values of Image Type that name what looks like a series and is computed from some: its times are those of its sources.
const COMPUTED: &[&str] = &[
    "T1 MAP", "T2 MAP", "T2_STAR MAP", "T1_MAP", "T2_MAP", "P", "PHASE", "PHASE MAP", "PHASE_MAP", "P_SE", "P_FFE", "VELOCITY",
    "VELOCITY MAP", "PROJECTION IMAGE", "MIP", "MNIP", "MIN_IP", "SUB", "SUBTRACTION", "SUBTRACT", "SWI", "B0 MAP", "B1", "FIELD_MAP",
];

/// The contrast of a series, from how it was made; its description decides only what the tags leave open:
///
/// | tags | contrast |
/// |---|---|
/// | Acquisition Contrast of an enhanced object | as it says |
/// | b-value, Image Type of a map, Angio Flag, echo-planar, T2*-weighted or balanced gradient echoes | none |
/// | long inversion time (or IR with a long repetition), long echo | FLAIR |
/// | no inversion, long echo | T2 |
/// | short echo with a short repetition, or an inversion between fat's and fluid's | T1, or T1c if agent was given |
/// | anything else | none |
///
/// Left open are: whether agent was given where no tag says so, whether fast gradient echoes show flow, whether a research sequence
/// with a long echo suppresses fluid, and everything where echo and repetition times are missing.
///
/// # Errors
/// [`NotAContrast`]: diffusion, perfusion, angiography, fat-suppressed or T2*-weighted images, and what says nothing.
pub fn contrast_of(mr: &MrAcquisition) -> Result<Contrast, NotAContrast> {
    let words = words_of(&mr.description);
    let says = |any: &[&str]| words.iter().any(|w| any.contains(&w.as_str()));
    let lists = |values: &str, any: &[&str]| values.split('\\').any(|value| any.contains(&value.trim()));
    let t1 = || {
        let told = || says(AGENT_WORDS) && !says(NO_AGENT_WORDS) || says(T1C_WORDS);
        if mr.contrast_agent.unwrap_or_else(told) { Contrast::T1c } else { Contrast::T1 }
    };
    if mr.diffusion || lists(&mr.image_type, MAPS_OF_MOTION) {
        return Err(NotAContrast("diffusion or perfusion"));
    }
    if lists(&mr.image_type, COMPUTED) {
        return Err(NotAContrast("computed from other images"));
    }
    match mr.acquisition_contrast.as_str() {
        "FLUID_ATTENUATED" => return Ok(Contrast::Flair),
        "T1" => return Ok(t1()),
        "T2" if mr.inversion_ms.is_none_or(|ti| ti < INVERSION_OF_FLUID) => return Ok(Contrast::T2),
        "DIFFUSION" | "PERFUSION" | "FLOW_ENCODED" | "PROTON_DENSITY" | "STIR" | "T2_STAR" | "TAGGING" | "TOF" => {
            return Err(NotAContrast("an acquisition contrast that is none of the four"));
        }
        _ => {}
    }
    let has = |code: &str| lists(&mr.scanning_sequence, &[code]);
    if let (Some(echo), Some(repetition)) = (mr.echo_ms, mr.repetition_ms) {
        let inverted = has("IR") || mr.inversion_ms.is_some();
        let gradient = has("GR") && !has("SE") && !inverted;
        if has("EP") && !inverted {
            return Err(NotAContrast("echo-planar images"));
        }
        if mr.angiography || gradient && repetition < REPETITION_OF_FLOW && says(FLOW_WORDS) {
            return Err(NotAContrast("angiography"));
        }
        if gradient && echo > 12.0 {
            return Err(NotAContrast("T2*-weighted gradient echoes"));
        }
        // Siemens, GE and Philips mark their T1-weighted gradient echoes as spoiled or prepared besides.
        if gradient && lists(&mr.sequence_variant, &["SS"]) && !lists(&mr.sequence_variant, &["SP", "OSP", "MP"]) {
            return Err(NotAContrast("balanced gradient echoes, on which fluid is bright"));
        }
        let unnamed = !has("SE") && !has("GR");
        return match mr.inversion_ms {
            Some(inversion) if inversion >= INVERSION_OF_FLUID && echo >= ECHO_LONG => Ok(Contrast::Flair),
            Some(inversion) if inversion < INVERSION_OF_FAT => Err(NotAContrast("short inversion times suppress fat")),
            Some(inversion) if inversion < INVERSION_OF_T1 && echo <= ECHO_SHORT => Ok(t1()),
            // Inversion recovery without its time: a long repetition with a long echo is how fluid is suppressed.
            None if has("IR") && echo >= ECHO_LONG && repetition >= REPETITION_OF_FLUID => Ok(Contrast::Flair),
            None if unnamed && echo >= ECHO_LONG && repetition >= REPETITION_OF_FLUID && says(FLAIR_WORDS) => Ok(Contrast::Flair),
            None if !has("IR") && echo >= ECHO_LONG && repetition >= REPETITION_SINGLE_SHOT => Ok(Contrast::T2),
            None if echo <= ECHO_SHORT && repetition < REPETITION_LONG => Ok(t1()),
            // Gradient echoes prepared by inversion count the repetition from one inversion to the next.
            None if echo <= 10.0 && has("GR") && has("IR") => Ok(t1()),
            _ => Err(NotAContrast("echo, repetition and inversion times that fit none of the four contrasts")),
        };
    }
    if says(&["dwi", "adc", "diffusion", "dti", "trace", "perf", "perfusion", "dsc", "dce", "bold", "asl"]) {
        Err(NotAContrast("diffusion or perfusion by its description"))
    } else if says(FLOW_WORDS) || says(&["mip", "swi", "swan", "t2star", "pd", "loc", "localizer", "localiser", "scout", "survey"]) {
        Err(NotAContrast("by its description none of the four contrasts"))
    } else if says(FLAIR_WORDS) {
        Ok(Contrast::Flair)
    } else if says(&["t1", "t1w", "t1n", "mprage", "spgr", "bravo", "tfe"]) || says(T1C_WORDS) {
        Ok(t1())
    } else if says(&["t2", "t2w"]) {
        Ok(Contrast::T2)
    } else {
        Err(NotAContrast("neither its tags nor its description tell its contrast"))
    }
}

const FLAIR_WORDS: &[&str] = &["flair", "t2f", "t2flair", "dark", "fluid"];
const FLOW_WORDS: &[&str] = &["tof", "mra", "mrv", "angio", "angiography", "venography"];
const T1C_WORDS: &[&str] = &["t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1km"];
/// English, German (Kontrastmittel), French, Italian (mezzo di contrasto), Spanish.
const AGENT_WORDS: &[&str] =
    &["post", "gd", "gad", "gado", "gadolinium", "contrast", "ce", "c", "km", "kontrast", "contraste", "inj", "injection", "mdc"];
const NO_AGENT_WORDS: &[&str] = &["pre", "without", "wo", "non", "no", "native", "nativ", "plain", "before", "ohne", "vor", "sans", "sin", "senza"];

/// Words in lower case, broken at whatever is no letter or digit; `+C` is a word of its own.
fn words_of(description: &str) -> Vec<String> {
    let lower = description.to_lowercase().replace('+', " ").replace("t2*", "t2star").replace("w/o", "without");
    lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(Into::into).collect()
}

/// What is known of a series when the choice is made.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Series Instance UID.
    pub series: Uid,
    /// Its contrast, or why it is none.
    pub contrast: Result<Contrast, String>,
    /// Voxel spacing, largest first.
    pub spacing_mm: [f64; 3],
    /// Voxels.
    pub voxels: usize,
}

/// Which series stands for which contrast, and why the others do not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// By contrast ([`Contrast::ALL`]): index of the series.
    pub chosen: [Option<usize>; 4],
    /// Index and reason of each that was set aside.
    pub set_aside: Vec<(usize, String)>,
}

/// Chooses among the series of a study. Of two for one contrast the one whose largest spacing is the smaller is taken (thin slices show
/// more), then the one with more voxels, then the one whose UID comes first.
pub fn choose(candidates: &[Candidate]) -> Choice {
    let mut choice = Choice { chosen: [None; 4], set_aside: Vec::new() };
    let better = |a: &Candidate, b: &Candidate| {
        // Spacings are written with few digits.
        let tenths = |c: &Candidate| (c.spacing_mm[0] * 10.0).round() as i64;
        let by_text = a.series.as_str().cmp(b.series.as_str());
        tenths(a).cmp(&tenths(b)).then(b.voxels.cmp(&a.voxels)).then(by_text).is_lt()
    };
    for (n, candidate) in candidates.iter().enumerate() {
        let contrast = match &candidate.contrast {
            Ok(contrast) => *contrast,
            Err(why) => {
                choice.set_aside.push((n, why.clone()));
                continue;
            }
        };
        let place = &mut choice.chosen[contrast as usize];
        let loser = match *place {
            None => {
                *place = Some(n);
                continue;
            }
            Some(other) if better(candidate, &candidates[other]) => {
                *place = Some(n);
                other
            }
            Some(_) => n,
        };
        choice.set_aside.push((loser, format!("another {} series has thinner slices or more voxels", contrast.name())));
    }
    choice.set_aside.sort();
    choice
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scanning Sequence, repetition, echo and inversion time, agent.
    fn made(sequence: &str, tr: f64, te: f64, ti: Option<f64>, agent: Option<bool>) -> MrAcquisition {
        MrAcquisition {
            scanning_sequence: sequence.into(),
            repetition_ms: Some(tr),
            echo_ms: Some(te),
            inversion_ms: ti,
            contrast_agent: agent,
            ..MrAcquisition::default()
        }
    }

    fn described(mr: MrAcquisition, description: &str) -> MrAcquisition {
        MrAcquisition { description: description.into(), ..mr }
    }

    fn of_kind(mr: MrAcquisition, image_type: &str) -> MrAcquisition {
        MrAcquisition { image_type: image_type.into(), ..mr }
    }

    fn varied(mr: MrAcquisition, variant: &str) -> MrAcquisition {
        MrAcquisition { sequence_variant: variant.into(), ..mr }
    }

    /// As scanners write them, and what they are.
    fn told_by_tags() -> Vec<(Option<Contrast>, MrAcquisition)> {
        use Contrast::{Flair, T1, T1c, T2};
        const NO: Option<bool> = Some(false);
        const YES: Option<bool> = Some(true);
        vec![
            // Spin echo, turbo spin echo and its volumes.
            (Some(T1), made("SE", 550.0, 14.0, None, NO)),
            (Some(T1c), made("SE", 600.0, 10.0, None, YES)),
            (Some(T1), made("SE", 700.0, 28.0, None, NO)),
            (Some(T2), made("SE", 4500.0, 100.0, None, NO)),
            (Some(T2), made("SE", 4500.0, 100.0, None, YES)),
            (Some(T2), made("SE", 3200.0, 408.0, None, NO)),
            (Some(T2), made("RM", 2500.0, 80.0, None, NO)),
            (Some(T2), made("SE", 1100.0, 92.0, None, NO)),
            (None, made("SE", 3000.0, 20.0, None, NO)),
            // Inversion recovery.
            (Some(Flair), made("SE\\IR", 9000.0, 120.0, Some(2500.0), NO)),
            (Some(Flair), made("SE\\IR", 5000.0, 395.0, Some(1800.0), YES)),
            (Some(Flair), made("IR", 11_000.0, 125.0, Some(2800.0), NO)),
            (Some(Flair), made("SE", 4800.0, 320.0, Some(1650.0), NO)),
            (Some(Flair), made("IR", 10_000.0, 140.0, None, NO)),
            (Some(Flair), made("RM", 6000.0, 117.0, Some(1850.0), NO)),
            (Some(T1), made("SE\\IR", 2200.0, 12.0, Some(860.0), NO)),
            (Some(T1c), made("SE\\IR", 2600.0, 24.0, Some(750.0), YES)),
            (None, made("SE\\IR", 4000.0, 60.0, Some(160.0), NO)),
            // Gradient echoes.
            (Some(T1), varied(made("GR\\IR", 2300.0, 3.0, Some(900.0), NO), "SK\\SP\\MP")),
            (Some(T1c), varied(made("GR\\IR", 1900.0, 2.5, Some(900.0), YES), "SK\\SP\\MP")),
            (Some(T1), varied(made("GR", 8.2, 3.2, Some(450.0), NO), "SS\\SP\\SK")),
            (Some(T1), varied(made("GR", 9.8, 4.6, None, NO), "MP")),
            (Some(T1c), varied(made("GR", 250.0, 2.5, None, YES), "SP")),
            (Some(T1), made("GR\\IR", 2500.0, 3.5, None, NO)),
            (None, made("GR\\IR", 5000.0, 3.0, Some(2500.0), NO)),
            (None, varied(made("GR", 5.6, 2.4, None, NO), "SS")),
            (None, made("GR", 600.0, 20.0, None, NO)),
            (None, made("GR", 28.0, 20.0, None, YES)),
            (None, MrAcquisition { angiography: true, ..made("GR", 22.0, 3.7, None, NO) }),
            // Echo-planar images, and what is computed.
            (None, made("EP\\SE", 8000.0, 90.0, None, NO)),
            (None, made("EP\\GR", 1500.0, 30.0, None, YES)),
            (None, MrAcquisition { diffusion: true, ..made("SE", 5000.0, 80.0, None, NO) }),
            (None, of_kind(made("SE", 5000.0, 80.0, None, NO), "DERIVED\\PRIMARY\\DIFFUSION\\ADC\\ND")),
            (None, of_kind(made("SE", 600.0, 10.0, None, YES), "DERIVED\\SECONDARY\\M\\SUB")),
            (None, of_kind(made("GR", 30.0, 5.0, None, NO), "DERIVED\\SECONDARY\\PROJECTION IMAGE")),
            (Some(T1c), of_kind(made("GR\\IR", 1900.0, 2.5, Some(900.0), YES), "DERIVED\\SECONDARY\\MPR")),
        ]
    }

    #[test]
    fn tags_tell_the_contrasts_apart_whatever_the_description_says() {
        let lies = [
            "", "AX T1", "AX T1 +C", "T1 POST GAD", "t1 pre contrast", "AX T2", "T2 FLAIR", "FLAIR dark fluid", "T2* GRE", "DWI b1000", "ADC",
            "PERF DSC", "STIR", "PD", "localizer", "SCOUT", "SWI", "MIP", "MPRAGE", "t1ce", "scan 3", "\u{1F9E0}", "without", "KM nativ",
        ];
        for (want, tags) in told_by_tags() {
            for lie in lies {
                let lying = described(tags.clone(), lie);
                assert_eq!(contrast_of(&lying).ok(), want, "{lying:?}");
            }
        }
    }

    #[test]
    fn the_acquisition_contrast_of_an_enhanced_object_is_believed_before_its_times() {
        let enhanced = |says: &str, ti, agent| MrAcquisition { acquisition_contrast: says.into(), ..made("", 8000.0, 90.0, ti, agent) };
        for (want, tags) in [
            (Some(Contrast::Flair), enhanced("FLUID_ATTENUATED", None, None)),
            (Some(Contrast::T1), enhanced("T1", None, Some(false))),
            (Some(Contrast::T1c), enhanced("T1", None, Some(true))),
            (Some(Contrast::T2), enhanced("T2", None, None)),
            // Philips calls its FLAIR T2-weighted, which it is.
            (Some(Contrast::Flair), enhanced("T2", Some(2400.0), None)),
            (Some(Contrast::T2), enhanced("UNKNOWN", None, None)),
            (None, enhanced("PROTON_DENSITY", None, None)),
            (None, enhanced("DIFFUSION", None, None)),
            (None, enhanced("STIR", Some(200.0), None)),
        ] {
            assert_eq!(contrast_of(&tags).ok(), want, "{tags:?}");
        }
    }

    #[test]
    fn where_no_tag_says_whether_agent_was_given_the_description_does() {
        for (want, description) in [
            (Contrast::T1c, "AX T1 +C"),
            (Contrast::T1c, "T1 SE post Gd"),
            (Contrast::T1c, "t1_mprage_sag_C+"),
            (Contrast::T1c, "T1 nach KM"),
            (Contrast::T1, "AX T1"),
            (Contrast::T1, ""),
            (Contrast::T1, "T1 PRE CONTRAST"),
            (Contrast::T1, "T1 w/o contrast"),
            (Contrast::T1, "T1 nativ vor KM"),
        ] {
            let tags = described(made("SE", 600.0, 10.0, None, None), description);
            assert_eq!(contrast_of(&tags), Ok(want), "{description}");
        }
        let denied = described(made("SE", 600.0, 10.0, None, Some(false)), "T1 post Gd");
        assert_eq!(contrast_of(&denied), Ok(Contrast::T1), "the tag that denies it is believed");
    }

    #[test]
    fn what_numbers_leave_open_the_description_closes() {
        let volume = made("GR", 25.0, 4.0, None, Some(false));
        assert_eq!(contrast_of(&described(volume.clone(), "AX 3D SPGR")), Ok(Contrast::T1));
        assert!(contrast_of(&described(volume, "3D TOF MRA")).is_err());
        let research = made("RM", 6000.0, 120.0, None, None);
        assert_eq!(contrast_of(&described(research.clone(), "CUBE FLAIR")), Ok(Contrast::Flair));
        assert_eq!(contrast_of(&described(research, "CUBE")), Ok(Contrast::T2));
        for nothing in ["scan 3", "AX T2*", "T1 localizer", "ADC t2", "3D TOF T1"] {
            assert!(contrast_of(&described(MrAcquisition::default(), nothing)).is_err(), "{nothing}");
        }
    }

    #[test]
    fn without_tags_the_name_of_the_file_tells() {
        for (name, want) in [
            ("BraTS20_001_t1.nii.gz", Contrast::T1),
            ("BraTS20_001_t1ce.nii.gz", Contrast::T1c),
            ("t1c", Contrast::T1c),
            ("T1_POST", Contrast::T1c),
            ("case-t2f", Contrast::Flair),
            ("AX T2 FLAIR", Contrast::Flair),
            ("t2", Contrast::T2),
        ] {
            let made = MrAcquisition { description: name.into(), ..MrAcquisition::default() };
            assert_eq!(contrast_of(&made), Ok(want), "{name}");
        }
    }

    #[test]
    fn of_two_series_the_thinner_one_is_chosen_in_any_order_and_the_other_named() {
        let candidate = |uid: &str, contrast, thickest: f64, voxels| Candidate {
            series: Uid::parse(uid).unwrap(),
            contrast,
            spacing_mm: [thickest, 1.0, 1.0],
            voxels,
        };
        let mut all = vec![
            candidate("1.1", Ok(Contrast::T1c), 5.5, 100),
            candidate("1.2", Ok(Contrast::T1c), 1.0, 900),
            candidate("1.3", Ok(Contrast::Flair), 5.0, 100),
            candidate("1.4", Err("a scout".into()), 10.0, 3),
        ];
        for _ in 0..2 {
            let choice = choose(&all);
            let name = |n: Option<usize>| n.map(|n| all[n].series.to_string());
            assert_eq!(choice.chosen.map(name), [None, Some("1.2".into()), None, Some("1.3".into())]);
            assert_eq!(choice.set_aside.len(), 2);
            all.reverse();
        }
    }
}
