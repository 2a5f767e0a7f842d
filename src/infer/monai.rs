//! A MONAI bundle's `metadata.json` as a manifest: what it says is taken over, what it leaves open is asked for.
//!
//! The bundle format (MONAI `bundle` specification) tells channels, patch shape and value range; voxel spacing and
//! intensity window live in its Python configuration and must come from whoever imports it.

use std::collections::BTreeMap;

use serde_json::Value;

use super::manifest::{BadManifest, Input, Kind, Manifest, Output, SCHEMA, Scaling};

/// What the bundle does not say.
#[derive(Debug, Clone, PartialEq)]
pub struct Supplement {
    /// Name of the package.
    pub name: String,
    /// Working grid, z, y, x in mm.
    pub spacing_mm: [f64; 3],
    /// Values that become the bundle's value range; None for mean 0 and deviation 1.
    pub window: Option<[f64; 2]>,
    /// Where columns, rows and slices run. MONAI's arrays are mostly `RAS` with x first: of such, slices run to R, rows
    /// to A, columns to S, which is `SAR` here.
    pub orientation: String,
    /// Every channel is a label by itself (MONAI's `sigmoid: true`), and none is the background.
    pub sigmoid: bool,
}

/// Makes a manifest from `metadata.json`; the digests in `files` are those of the files beside it.
///
/// # Errors
/// [`BadManifest`] naming the field of the bundle that is missing or that no package can express.
pub fn manifest(metadata: &[u8], ask: &Supplement, files: BTreeMap<String, String>) -> Result<Manifest, BadManifest> {
    let bad = |field: &str, why: &str| BadManifest::new(field, why);
    let json: Value = serde_json::from_slice(metadata).map_err(|e| BadManifest::new("metadata.json", e.to_string()))?;
    let format = &json["network_data_format"];
    let only = |field: &str| -> Result<&Value, BadManifest> {
        let map = format[field].as_object().filter(|m| m.len() == 1);
        let one = map.and_then(|m| m.values().next());
        one.ok_or_else(|| BadManifest::new(format!("network_data_format.{field}"), "exactly one is wanted"))
    };
    let (image, pred) = (only("inputs")?, only("outputs")?);
    let spatial: Vec<usize> = image["spatial_shape"]
        .as_array()
        .and_then(|all| all.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok())).collect())
        .ok_or_else(|| bad("spatial_shape", "whole numbers are wanted; a shape such as \"32n\" must be fixed first"))?;
    let channels = image["num_channels"].as_u64().filter(|n| (1..=64).contains(n)).unwrap_or(1) as usize;
    let names = |of: &Value, count: usize, word: &str| -> Vec<String> {
        let name = |n: usize| of["channel_def"][n.to_string()].as_str().map_or_else(|| format!("{word} {n}"), str::to_owned);
        (0..count).map(name).collect()
    };
    let text = |field: &str| json[field].as_str().unwrap_or_default().to_owned();
    let classes = pred["num_channels"].as_u64().filter(|n| (1..=256).contains(n)).unwrap_or(1) as usize;
    let kind = match pred["format"].as_str().or(pred["type"].as_str()) {
        Some("segmentation" | "labels" | "probabilities" | "image") => Kind::Segmentation,
        Some("classes" | "classification" | "probability") => Kind::Classification,
        other => return Err(BadManifest::new("outputs", format!("the format {other:?} is none that a package can have"))),
    };
    let mut labels = names(pred, classes, "label");
    let first = labels[0].to_lowercase();
    if ask.sigmoid {
        labels.insert(0, "background".into());
    } else if kind == Kind::Segmentation && pred["channel_def"]["0"].is_string() && !first.contains("background") {
        let why = format!("channel 0 is {first:?} and not the background: is each channel a label by itself (--sigmoid)?");
        return Err(BadManifest::new("channel_def", why));
    }
    let range = image["value_range"].as_array().and_then(|r| Some([r.first()?.as_f64()?, r.get(1)?.as_f64()?]));
    let manifest = Manifest {
        schema: SCHEMA.into(),
        name: ask.name.clone(),
        version: json["version"].as_str().unwrap_or("0.0.0").into(),
        kind,
        summary: text("description"),
        licence: match text("license") {
            empty if empty.is_empty() => "unknown: ask the bundle's authors".into(),
            said => said,
        },
        input: Input {
            modality: image["modality"].as_str().unwrap_or("CT").into(),
            channels: names(image, channels, "channel"),
            dimensions: spatial.len(),
            spacing_mm: ask.spacing_mm,
            orientation: ask.orientation.clone(),
            shape: [1, channels].into_iter().chain(spatial).collect(),
            scaling: if ask.window.is_some() { Scaling::Window } else { Scaling::ZScore },
            window: ask.window,
            range: range.unwrap_or([0.0, 1.0]),
            ..Input::default()
        },
        output: Output {
            // The activation stands in the bundle's post-processing, not in its network.
            kind: if ask.sigmoid { "sigmoid-logits" } else { "logits" }.into(),
            labels,
            ..Output::default()
        },
        thresholds: BTreeMap::new(),
        golden: None,
        files,
        provenance: [("bundle", text("name")), ("copyright", text("copyright")), ("data", text("data_source"))]
            .into_iter()
            .filter(|(_, said)| !said.is_empty())
            .map(|(name, said)| (name.to_owned(), toml::Value::from(said)))
            .collect(),
    };
    manifest.check()?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPLEEN: &str = r#"{"version": "0.5.9", "name": "Spleen CT", "description": "Spleen in CT", "copyright": "MONAI Consortium",
        "network_data_format": {
          "inputs": {"image": {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1,
            "spatial_shape": [96, 96, 96], "dtype": "float32", "value_range": [0, 1], "is_patch_data": true, "channel_def": {"0": "image"}}},
          "outputs": {"pred": {"type": "image", "format": "segmentation", "num_channels": 2, "spatial_shape": [96, 96, 96],
            "dtype": "float32", "value_range": [], "is_patch_data": true, "channel_def": {"0": "background", "1": "spleen"}}}}}"#;

    fn import(json: &str) -> Result<Manifest, BadManifest> {
        import_as(json, false)
    }

    fn import_as(json: &str, sigmoid: bool) -> Result<Manifest, BadManifest> {
        let ask = Supplement {
            sigmoid,
            name: "spleen".into(),
            spacing_mm: [2.0, 1.5, 1.5],
            window: Some([-57.0, 164.0]),
            orientation: "SAR".into(),
        };
        manifest(json.as_bytes(), &ask, BTreeMap::from([("model.onnx".into(), "0".repeat(64))]))
    }

    #[test]
    fn what_a_bundle_says_is_in_the_manifest_and_the_manifest_can_be_read_back() {
        let made = import(SPLEEN).unwrap();
        assert_eq!(made.input.shape, [1, 1, 96, 96, 96]);
        assert_eq!(made.output.labels, ["background", "spleen"]);
        assert_eq!(made.input.window, Some([-57.0, 164.0]));
        assert_eq!(Manifest::parse(&toml::to_string(&made).unwrap()).unwrap(), made);
    }

    #[test]
    fn channels_that_are_labels_by_themselves_are_never_taken_for_a_background() {
        let tumour = SPLEEN.replace("\"background\"", "\"Tumor core\"").replace("\"spleen\"", "\"Whole tumor\"");
        let error = import(&tumour).unwrap_err();
        assert!(error.field == "channel_def" && error.why.contains("--sigmoid"), "{error}");
        let made = import_as(&tumour, true).unwrap();
        assert_eq!(made.output.labels, ["background", "Tumor core", "Whole tumor"]);
        assert_eq!((made.output.kind.as_str(), made.output.background()), ("sigmoid-logits", Some(0.0)));
    }

    #[test]
    fn what_a_package_cannot_express_is_refused_by_name() {
        for (field, json) in [
            ("metadata.json", "{".to_owned()),
            ("spatial_shape", SPLEEN.replace("[96, 96, 96]", "[\"16*n\", 96, 96]")),
            ("input.dimensions", SPLEEN.replace("[96, 96, 96]", "[96]")),
            ("outputs", SPLEEN.replace("\"segmentation\"", "\"boxes\"")),
            ("network_data_format.inputs", SPLEEN.replace("\"image\": {\"type\"", "\"mask\": {}, \"image\": {\"type\"")),
        ] {
            assert_eq!(import(&json).unwrap_err().field, field);
        }
    }
}
