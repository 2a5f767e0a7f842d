//! Claims about packages: sound ones are taken whole, each fault is named.

use super::*;
use ed25519_dalek::{Signer, SigningKey};

const FOREST_JSON: &[u8] = br#"{"schema": "scanside.forest/1", "features": ["a", "b"], "trees": [
    {"feature": [1, -1, -1], "threshold": [6.5, 0, 0], "left": [1, -1, -1], "right": [2, -1, -1], "value": [0, 0.25, 0.75]}]}"#;

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A sound forest package; `change` spoils its manifest.
fn write(dir: &Path, change: impl Fn(String) -> String) {
    let files = [
        ("forest.json", FOREST_JSON.to_vec()),
        ("golden/input.bin", floats(&[0.0, 6.0, 0.0, 7.0])),
        ("golden/output.bin", floats(&[0.25, 0.75])),
    ];
    let mut text = String::from(
        "schema = \"scanside.model/1\"\nname = \"stump\"\nversion = \"1.0.0\"\nkind = \"forest\"\nlicence = \"MIT\"\n\
         [golden]\ninput = \"golden/input.bin\"\ninput_shape = [2, 2]\noutputs = [\"golden/output.bin\"]\n\
         output_shapes = [[2]]\ntolerance = 0.0\n[files]\n",
    );
    fs::create_dir_all(dir.join("golden")).unwrap();
    for (name, bytes) in &files {
        fs::write(dir.join(name), bytes).unwrap();
        text += &format!("\"{name}\" = \"{}\"\n", hex(&Sha256::digest(bytes)));
    }
    fs::write(dir.join(MANIFEST), change(text)).unwrap();
}

fn spoilt(change: impl Fn(String) -> String) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), change);
    Package::read(dir.path(), &Trust::default())
        .and_then(|package| package.check_golden(&Pool::new(1)))
        .map(|_| String::new())
        .unwrap_or_else(|error| error.to_string())
}

#[test]
fn a_sound_package_is_read_checked_and_installed_whole() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("here");
    write(&source, |text| text);
    let (package, place) = Package::install(&source, &dir.path().join("models"), &Trust::default()).unwrap();
    assert_eq!(package.check_golden(&Pool::new(1)).unwrap(), Some(0.0));
    assert_eq!(package.unlisted(&place).unwrap(), [""; 0]);
    let models = Models::new(Some(dir.path().join("models")), Trust::default());
    assert!(models.has("stump"));
    assert_eq!(models.package("stump").unwrap().id(), package.id());
    fs::write(place.join("extra.txt"), "?").unwrap();
    assert_eq!(package.unlisted(&place).unwrap(), ["extra.txt"]);
    let unknown = models.package("no-such").unwrap_err().to_string();
    assert!(unknown.contains("stump"), "{unknown}");
}

#[test]
fn a_packed_golden_file_is_read_as_far_as_its_shape_goes() {
    use std::io::Write;
    let packed = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    };
    let plain = floats(&[1.0, 2.0, 3.0]);
    assert_eq!(numbers("a.bin", &plain, &[3]).unwrap(), plain);
    assert_eq!(numbers("a.bin.gz", &packed(&plain), &[3]).unwrap(), plain);
    assert_eq!(numbers("a.bin.gz", &packed(&vec![0; 1 << 20]), &[3]).unwrap().len(), 13, "one byte too many is enough to refuse it");
    assert!(numbers("a.bin.gz", &packed(&plain)[..12], &[3]).is_err());
}

#[test]
fn a_package_that_is_not_what_it_says_is_refused_with_the_reason() {
    assert_eq!(spoilt(|text| text), "");
    let cases: [(&str, &dyn Fn(String) -> String); 9] = [
        ("schema", &|t| t.replace("scanside.model/1", "scanside.model/2")),
        ("name", &|t| t.replace("\"stump\"", "\"../stump\"")),
        ("not the name of a file inside", &|t| t.replace("\"forest.json\"", "\"../forest.json\"")),
        ("64 hexadecimal", &|t| t.replacen("\" = \"", "\" = \"x", 1)),
        ("does not list forest.json", &|t| t.lines().filter(|l| !l.starts_with("\"forest")).collect::<Vec<_>>().join("\n")),
        ("line 4", &|t| t.replace("\"forest\"", "\"jungle\"")),
        ("[files] does not list", &|t| t.replace("input = \"golden/input.bin\"", "input = \"golden/other.bin\"")),
        ("not those of", &|t| t.replace("input_shape = [2, 2]", "input_shape = [3, 2]")),
        ("SHA-256", &|t| {
            let at = t.rfind('"').unwrap();
            let last = if &t[at - 1..at] == "0" { "1" } else { "0" };
            format!("{}{last}{}", &t[..at - 1], &t[at..])
        }),
    ];
    for (reason, change) in cases {
        let said = spoilt(change);
        assert!(said.contains(reason), "{reason}: {said:?}");
    }
}

#[test]
fn a_golden_output_that_this_machine_does_not_give_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let wrong = floats(&[0.25, 0.5]);
    let right = hex(&Sha256::digest(floats(&[0.25, 0.75])));
    write(dir.path(), |text| text.replace(&right, &hex(&Sha256::digest(&wrong))));
    fs::write(dir.path().join("golden/output.bin"), &wrong).unwrap();
    let package = Package::read(dir.path(), &Trust::default()).unwrap();
    let said = package.check_golden(&Pool::new(1)).unwrap_err().to_string();
    assert!(said.contains("differs from its golden output by 0.25"), "{said}");
}

#[test]
fn a_board_that_demands_signatures_takes_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), |text| text);
    let key = SigningKey::from_bytes(&[7; 32]);
    let trust = Trust::demanding(&hex(key.verifying_key().as_bytes())).unwrap();
    let read = || Package::read(dir.path(), &trust).map(|_| ()).map_err(|e| e.to_string());
    assert!(read().unwrap_err().contains("no model.sig"));
    let manifest = fs::read(dir.path().join(MANIFEST)).unwrap();
    let signature = key.sign(&manifest);
    fs::write(dir.path().join(SIGNATURE), signature.to_bytes()).unwrap();
    read().unwrap();
    fs::write(dir.path().join(SIGNATURE), hex(&signature.to_bytes())).unwrap();
    read().unwrap();
    let other = SigningKey::from_bytes(&[8; 32]).sign(&manifest);
    fs::write(dir.path().join(SIGNATURE), other.to_bytes()).unwrap();
    assert!(read().unwrap_err().contains("does not sign"));
    fs::write(dir.path().join(SIGNATURE), "short").unwrap();
    assert!(read().unwrap_err().contains("not an ed25519 signature"));
    assert!(Trust::demanding("no key").is_err());
}

#[test]
fn every_package_in_the_binary_is_sound_and_says_its_golden_output_here() {
    let models = Models::default();
    for (name, _) in models.list() {
        let package = models.package(&name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(package.id().name, name);
        package.check_golden(&Pool::new(2)).unwrap_or_else(|error| panic!("{error}"));
    }
}
