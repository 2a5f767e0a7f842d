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

// Milliseconds. The bounds are wide: spin echo and turbo spin echo from 0.2 to 3 T lie inside, and between them is nothing
// that the exam could use (Bernstein, King, Zhou, Handbook of MRI Pulse Sequences, 2004).
const ECHO_SHORT: f64 = 35.0;
const ECHO_LONG: f64 = 60.0;
const REPETITION_LONG: f64 = 1800.0;
/// Fluid is nulled from about here on; fat is nulled at 120 to 250, and T1-weighted inversion recovery uses less than 1300.
const INVERSION_OF_FLUID: f64 = 1500.0;

/// The contrast of a series, from how it was made; its description decides only what the numbers leave open.
///
/// # Errors
/// [`NotAContrast`]: diffusion, perfusion, angiography, fat-suppressed or T2*-weighted images, and what says nothing.
pub fn contrast_of(mr: &MrAcquisition) -> Result<Contrast, NotAContrast> {
    let words = words_of(&mr.description);
    let says = |any: &[&str]| words.iter().any(|w| any.contains(&w.as_str()));
    if says(&["dwi", "adc", "diffusion", "dti", "trace", "perf", "perfusion", "dsc", "dce", "bold", "asl"]) {
        return Err(NotAContrast("diffusion or perfusion by its description"));
    }
    if says(&["tof", "mra", "angio", "mip", "swi", "swan", "t2star", "pd", "loc", "localizer", "localiser", "scout", "survey"]) {
        return Err(NotAContrast("by its description none of the four contrasts"));
    }
    let has = |code: &str| mr.scanning_sequence.split('\\').any(|c| c.trim() == code);
    let enhanced = mr.acquisition_contrast.as_str();
    let agent = mr.contrast_agent;
    let t1 = || {
        // Some consoles leave the agent's field empty; then the words speak.
        let after = agent || says(&["post", "gd", "gad", "gado", "contrast", "ce", "c", "km"]) || says(T1C_WORDS);
        if after { Contrast::T1c } else { Contrast::T1 }
    };
    match enhanced {
        "FLUID_ATTENUATED" => return Ok(Contrast::Flair),
        "T1" => return Ok(t1()),
        "T2" if mr.inversion_ms.is_none_or(|ti| ti < INVERSION_OF_FLUID) => return Ok(Contrast::T2),
        "DIFFUSION" | "PERFUSION" | "FLOW_ENCODED" | "PROTON_DENSITY" | "STIR" | "T2_STAR" | "TAGGING" | "TOF" => {
            return Err(NotAContrast("an acquisition contrast that is none of the four"));
        }
        _ => {}
    }
    if let (Some(echo), Some(repetition)) = (mr.echo_ms, mr.repetition_ms) {
        let inverted = has("IR") || mr.inversion_ms.is_some();
        if has("EP") && !inverted {
            return Err(NotAContrast("echo-planar images"));
        }
        if has("GR") && !has("SE") && !inverted && echo > 12.0 {
            return Err(NotAContrast("T2*-weighted gradient echoes"));
        }
        return match mr.inversion_ms {
            Some(inversion) if inversion >= INVERSION_OF_FLUID && echo >= ECHO_LONG => Ok(Contrast::Flair),
            Some(inversion) if inversion < 300.0 => Err(NotAContrast("short inversion times suppress fat")),
            Some(_) if echo <= ECHO_SHORT => Ok(t1()),
            // Inversion recovery without its time: a long repetition with a long echo is how fluid is suppressed.
            None if has("IR") && echo >= ECHO_LONG && repetition >= 4000.0 => Ok(Contrast::Flair),
            None if echo >= ECHO_LONG && repetition >= REPETITION_LONG && says(&["flair", "dark", "fluid"]) => Ok(Contrast::Flair),
            None if echo >= ECHO_LONG && repetition >= REPETITION_LONG => Ok(Contrast::T2),
            None if echo <= ECHO_SHORT && repetition < REPETITION_LONG => Ok(t1()),
            // Gradient echoes prepared by inversion count the repetition from one inversion to the next.
            None if echo <= 10.0 && has("GR") => Ok(t1()),
            _ => Err(NotAContrast("echo and repetition times that fit none of the four contrasts")),
        };
    }
    if says(&["flair", "t2f", "t2flair"]) {
        Ok(Contrast::Flair)
    } else if says(&["t1", "t1w", "t1n", "mprage", "spgr", "bravo", "tfe"]) || says(T1C_WORDS) {
        Ok(t1())
    } else if says(&["t2", "t2w"]) {
        Ok(Contrast::T2)
    } else {
        Err(NotAContrast("neither its tags nor its description tell its contrast"))
    }
}

const T1C_WORDS: &[&str] = &["t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1km"];

/// Words in lower case, broken at whatever is no letter or digit; `+C` is a word of its own.
fn words_of(description: &str) -> Vec<String> {
    let lower = description.to_lowercase().replace('+', " ").replace("t2*", "t2star");
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

    fn mr(sequence: &str, tr: f64, te: f64, ti: Option<f64>, agent: bool, description: &str) -> MrAcquisition {
        MrAcquisition {
            scanning_sequence: sequence.into(),
            repetition_ms: Some(tr),
            echo_ms: Some(te),
            inversion_ms: ti,
            contrast_agent: agent,
            description: description.into(),
            ..MrAcquisition::default()
        }
    }

    #[test]
    fn tags_tell_the_contrasts_apart_whatever_the_description_says() {
        use Contrast::{Flair, T1, T1c, T2};
        for (want, made) in [
            (T1, mr("SE", 550.0, 14.0, None, false, "AX")),
            (T1, mr("GR\\IR", 2300.0, 3.0, Some(900.0), false, "MPRAGE")),
            (T1, mr("GR", 8.2, 3.2, Some(450.0), false, "BRAVO")),
            (T1, mr("SE\\IR", 2200.0, 12.0, Some(860.0), false, "AX T1 FLAIR")),
            (T1c, mr("SE", 600.0, 10.0, None, true, "AX T2 misnamed")),
            (T1c, mr("SE", 600.0, 10.0, None, false, "AX T1 +C")),
            (T1c, mr("GR\\IR", 1900.0, 2.5, Some(900.0), true, "")),
            (T2, mr("SE", 4500.0, 100.0, None, false, "AX FSE")),
            (T2, mr("SE", 4500.0, 100.0, None, true, "AX T2 after contrast")),
            (Flair, mr("SE\\IR", 9000.0, 120.0, Some(2500.0), false, "AX")),
            (Flair, mr("IR", 10_000.0, 140.0, None, false, "")),
        ] {
            assert_eq!(contrast_of(&made), Ok(want), "{made:?}");
        }
    }

    #[test]
    fn what_is_none_of_the_four_is_said_to_be_none() {
        for made in [
            mr("EP", 8000.0, 90.0, None, false, "b1000"),
            mr("GR", 600.0, 20.0, None, false, "AX T2*"),
            mr("SE", 3000.0, 20.0, None, false, "double echo, first"),
            mr("SE\\IR", 4000.0, 60.0, Some(160.0), false, "STIR"),
            mr("GR", 25.0, 4.0, None, false, "3D TOF"),
            MrAcquisition { description: "scan 3".into(), ..MrAcquisition::default() },
        ] {
            assert!(contrast_of(&made).is_err(), "{made:?}");
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
