//! A random forest as data: trees read from `forest.json`, named features, one fixed order of evaluation.
//!
//! ```json
//! { "schema": "scanside.forest/1", "features": ["diameter_mm", "hu_mean"],
//!   "trees": [ { "feature": [0, -1, -1], "threshold": [6.5, 0, 0],
//!                "left": [1, -1, -1], "right": [2, -1, -1], "value": [0, 0.1, 0.8] } ] }
//! ```
//! A node with `feature` below zero is a leaf and its `value` (0 to 1) the answer; any other sends a case whose
//! feature is at most the threshold to the left. Children come after their parent, as scikit-learn writes them, so a
//! tree cannot be a circle. The forest's answer is the mean over its trees, in their order.

use serde::{Deserialize, Serialize};

/// The schema this code reads.
pub const SCHEMA: &str = "scanside.forest/1";
/// Nodes of all trees together: some 100 MiB in memory. More would be an attack on the memory, not a better forest.
const NODES_MAX: usize = 1 << 22;
const FEATURES_MAX: usize = 4096;

/// Why `forest.json` is not a forest.
#[derive(Debug, thiserror::Error)]
pub enum BadForest {
    /// Not JSON, or other fields.
    #[error("forest.json: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON, but no forest.
    #[error("forest.json: {0}")]
    Sense(String),
    /// It wants a feature nobody computes.
    #[error("the forest wants the feature {0:?}, which is not computed here")]
    UnknownFeature(String),
}

/// `forest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct File {
    schema: String,
    features: Vec<String>,
    trees: Vec<FileTree>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct FileTree {
    feature: Vec<i64>,
    threshold: Vec<f64>,
    left: Vec<i64>,
    right: Vec<i64>,
    value: Vec<f64>,
}

/// A checked forest.
#[derive(Debug, Clone)]
pub struct Forest {
    features: Vec<String>,
    nodes: Vec<Node>,
    roots: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// The threshold of a branch, the answer of a leaf.
    number: f64,
    /// `u16::MAX` for a leaf.
    feature: u16,
    children: [u32; 2],
}

const LEAF: u16 = u16::MAX;

impl Forest {
    /// Reads and checks `forest.json`.
    ///
    /// # Errors
    /// [`BadForest`] for anything that is not a forest of finite size whose every path ends.
    pub fn parse(json: &[u8]) -> Result<Self, BadForest> {
        let file: File = serde_json::from_slice(json)?;
        let sense = |text: String| BadForest::Sense(text);
        if file.schema != SCHEMA {
            return Err(sense(format!("schema {:?} is not {SCHEMA:?}", file.schema)));
        }
        let features = file.features.len();
        if features == 0 || features > FEATURES_MAX {
            return Err(sense(format!("{features} features; 1 to {FEATURES_MAX} are wanted")));
        }
        for (n, name) in file.features.iter().enumerate() {
            if file.features[..n].contains(name) {
                return Err(sense(format!("the feature {name:?} is named twice")));
            }
        }
        let total: usize = file.trees.iter().map(|t| t.feature.len()).sum();
        if file.trees.is_empty() || total > NODES_MAX {
            return Err(sense(format!("{} trees with {total} nodes; 1 to {NODES_MAX} nodes are wanted", file.trees.len())));
        }
        let mut forest = Self { features: file.features, nodes: Vec::with_capacity(total), roots: Vec::new() };
        for (t, tree) in file.trees.iter().enumerate() {
            forest.add(tree, features).map_err(|why| sense(format!("tree {t}: {why}")))?;
        }
        Ok(forest)
    }

    fn add(&mut self, tree: &FileTree, features: usize) -> Result<(), String> {
        let len = tree.feature.len();
        if len == 0 || [tree.threshold.len(), tree.left.len(), tree.right.len(), tree.value.len()] != [len; 4] {
            return Err("its lists are empty or of different lengths".into());
        }
        let root = self.nodes.len();
        self.roots.push(root as u32);
        for n in 0..len {
            if tree.feature[n] < 0 {
                if !(0.0..=1.0).contains(&tree.value[n]) {
                    return Err(format!("the value of leaf {n} is not between 0 and 1"));
                }
                self.nodes.push(Node { number: tree.value[n], feature: LEAF, children: [0; 2] });
                continue;
            }
            let feature = usize::try_from(tree.feature[n]).ok().filter(|f| *f < features);
            let feature = feature.ok_or_else(|| format!("node {n} asks for feature {}", tree.feature[n]))?;
            let child = |index: i64| {
                let inside = usize::try_from(index).ok().filter(|i| (n + 1..len).contains(i));
                inside.map(|i| (root + i) as u32).ok_or_else(|| format!("node {n} has the child {index}"))
            };
            if !tree.threshold[n].is_finite() {
                return Err(format!("the threshold of node {n} is not finite"));
            }
            let children = [child(tree.left[n])?, child(tree.right[n])?];
            self.nodes.push(Node { number: tree.threshold[n], feature: feature as u16, children });
        }
        Ok(())
    }

    /// Names of the features, in the order [`Forest::evaluate`] takes them.
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// Where each of the forest's features is in `available`.
    ///
    /// # Errors
    /// [`BadForest::UnknownFeature`].
    pub fn bind(&self, available: &[&str]) -> Result<Vec<usize>, BadForest> {
        let find = |name: &String| {
            available.iter().position(|a| a == name).ok_or_else(|| BadForest::UnknownFeature(name.clone()))
        };
        self.features.iter().map(find).collect()
    }

    /// The forest's answer, 0 to 1. A value is rounded to 32 bits before it is compared, as scikit-learn does; one that
    /// is not a number goes right.
    ///
    /// # Panics
    /// When `values` is not one number per feature.
    pub fn evaluate(&self, values: &[f64]) -> f64 {
        assert_eq!(values.len(), self.features.len());
        let mut sum = 0.0;
        for root in &self.roots {
            let mut node = self.nodes[*root as usize];
            while node.feature != LEAF {
                let value = f64::from(values[usize::from(node.feature)] as f32);
                node = self.nodes[node.children[usize::from(!(value <= node.number))] as usize];
            }
            sum += node.number;
        }
        sum / self.roots.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forest(trees: &str) -> Result<Forest, BadForest> {
        let text = format!(r#"{{"schema": "scanside.forest/1", "features": ["a", "b"], "trees": [{trees}]}}"#);
        Forest::parse(text.as_bytes())
    }

    const STUMP: &str = r#"{"feature": [1, -1, -1], "threshold": [6.5, 0, 0], "left": [1, -1, -1],
        "right": [2, -1, -1], "value": [0, 0.25, 0.75]}"#;
    const LEAF_ONLY: &str = r#"{"feature": [-2], "threshold": [-2], "left": [-1], "right": [-1], "value": [1]}"#;

    #[test]
    fn the_answer_is_the_mean_over_the_trees() {
        let f = forest(&format!("{STUMP}, {LEAF_ONLY}")).unwrap();
        assert_eq!(f.evaluate(&[0.0, 6.5]), 0.625);
        assert_eq!(f.evaluate(&[0.0, 6.6]), 0.875);
        assert_eq!(f.evaluate(&[0.0, f64::NAN]), 0.875);
    }

    #[test]
    fn features_are_found_by_name() {
        let f = forest(STUMP).unwrap();
        assert_eq!(f.bind(&["b", "c", "a"]).unwrap(), [2, 0]);
        assert_eq!(f.bind(&["a"]).unwrap_err().to_string(), r#"the forest wants the feature "b", which is not computed here"#);
    }

    #[test]
    fn a_tree_that_would_not_end_or_leaves_its_arrays_is_refused() {
        let wrong = [
            ("itself", STUMP.replace("\"left\": [1", "\"left\": [0")),
            ("outside", STUMP.replace("\"right\": [2", "\"right\": [3")),
            ("huge", STUMP.replace("\"right\": [2", "\"right\": [9223372036854775807")),
            ("negative", STUMP.replace("\"right\": [2", "\"right\": [-7")),
            ("feature", STUMP.replace("[1, -1, -1], \"thr", "[2, -1, -1], \"thr")),
            ("lengths", STUMP.replace("[6.5, 0, 0]", "[6.5, 0]")),
            ("value", STUMP.replace("0.75", "1.5")),
            ("empty", r#"{"feature": [], "threshold": [], "left": [], "right": [], "value": []}"#.into()),
        ];
        for (what, tree) in wrong {
            assert!(matches!(forest(&tree), Err(BadForest::Sense(_))), "{what}: {tree}");
        }
        assert!(forest("").is_err());
        assert!(Forest::parse(b"{}").is_err());
    }
}
