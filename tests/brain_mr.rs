//! Claims about the brain MR exam on a drawn head: its tumour is found, on its side, and the series are laid over each other.

use scanside::exam::brain_mr::contrast::Contrast;
use scanside::exam::brain_mr::{BrainMr, Source, StudyOutcome};
use scanside::finding::Laterality;
use scanside::geometry::{norm, sub};
use scanside::infer::package::{Models, Trust};
use scanside::phantom::brain::BrainPhantom;
use scanside::pool::Pool;
use scanside::study::Uid;
use scanside::volume::Volume;

fn analyze(phantom: &BrainPhantom, contrasts: &[Contrast]) -> StudyOutcome {
    let exam = BrainMr::load(&Models::new(None, Trust::default())).unwrap();
    let images: Vec<(Contrast, Uid, Volume)> =
        contrasts.iter().map(|c| (*c, Uid::derived(c.name().as_bytes()), phantom.volume(*c))).collect();
    let source = |(contrast, series, volume): &'static (Contrast, Uid, Volume)| Source { contrast: *contrast, series, volume };
    // Sources borrow their volumes; a test's few are kept until it ends.
    let images: &'static [_] = Box::leak(images.into_boxed_slice());
    exam.analyze(&images.iter().map(source).collect::<Vec<_>>(), &Pool::new(2), &|_| {}).unwrap()
}

#[test]
fn a_tumour_is_found_at_its_place_and_on_its_side() {
    for side in [Laterality::Left, Laterality::Right] {
        let phantom = BrainPhantom { side, ..BrainPhantom::default() };
        let study = analyze(&phantom, &Contrast::ALL);
        assert_eq!(study.reference, Uid::derived(b"T1c"), "findings refer to the T1c");
        let tumour = &study.outcome.findings[0];
        assert_eq!((tumour.kind.as_str(), tumour.site.laterality), ("tumour", Some(side)));
        let far = norm(sub(tumour.centroid_lps_mm.unwrap(), phantom.centre_lps_mm()));
        assert!(far < 8.0, "{far} mm from its place: {tumour:?}");
        let ml = tumour.volume_mm3.unwrap() / 1000.0;
        assert!((20.0..90.0).contains(&ml), "a ball of 45 mL was drawn, {ml} mL are found");
        // The patient turned between the series, by angles that are known.
        for (name, radians) in [("t1", 0.03f64), ("t2", 0.04), ("flair", 0.05)] {
            let found = study.outcome.measurements[&format!("{name}_registration_deg")].value;
            assert!((found - radians.to_degrees()).abs() < 0.6, "{name}: {found}");
        }
    }
}
