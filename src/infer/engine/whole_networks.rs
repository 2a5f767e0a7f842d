//! Whole quantized networks against ONNX Runtime, bit for bit, on every kernel of this processor.

use ndarray::{ArrayD, IxDyn};
use sha2::{Digest, Sha256};

use super::Network;
use crate::infer::kernels::Kernel;
use crate::pool::Pool;

const NETWORKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/networks");

fn network(name: &str) -> Vec<u8> {
    std::fs::read(format!("{NETWORKS}/{name}.onnx")).unwrap()
}

/// The input of `scanside model bench`: SplitMix64, uniform in ±1.5.
fn inputs(network: &Network) -> Vec<ArrayD<f32>> {
    let mut index = 0u64;
    let mut random = || {
        index += 1;
        let mut z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 40) as f32 / 16_777_216.0 - 0.5) * 3.0
    };
    network.input_shapes().iter().map(|shape| ArrayD::from_shape_simple_fn(IxDyn(shape), &mut random)).collect()
}

fn run(network: &Network, threads: usize) -> Vec<ArrayD<f32>> {
    let inputs = inputs(network);
    let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
    network.session().unwrap().run(&Pool::new(threads), &views).unwrap()
}

fn hash(outputs: &[ArrayD<f32>]) -> String {
    let bytes: Vec<u8> = outputs.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_kernel_gives_the_bits_of_onnx_runtime() {
    let expected = std::fs::read_to_string(format!("{NETWORKS}/expected.txt")).unwrap();
    for (name, hash_of) in expected.lines().filter_map(|line| line.split_once(' ')) {
        for kernel in Kernel::available() {
            let network = Network::load_for(&network(name), Some(kernel)).unwrap();
            for threads in [1, 3] {
                assert_eq!(hash(&run(&network, threads)), hash_of, "{name} on {} and {threads} threads", kernel.name());
            }
        }
    }
}

#[test]
fn quantized_networks_run_in_integers_from_end_to_end() {
    for name in ["tiny-unet2.qdq", "tiny-unet3.qdq", "tiny-unet3-transposed.qdq", "tiny-retina.qdq", "tiny-densenet.qop", "tiny-odd.qdq"] {
        let network = Network::load(&network(name)).unwrap();
        assert!(network.is_all_integer(), "{name}: {:?}", network.kept());
        assert!(network.arena_bytes() > 0);
    }
}

#[test]
fn integers_agree_with_the_same_file_run_in_floats() {
    for name in ["tiny-unet2.qdq", "tiny-unet3-transposed.qdq", "tiny-retina.qdq", "tiny-odd.qdq"] {
        let bytes = network(name);
        let ours = run(&Network::load(&bytes).unwrap(), 1);
        let floats = run(&Network::load_for(&bytes, None).unwrap(), 1);
        for (ours, floats) in ours.iter().zip(&floats) {
            assert_eq!(ours.shape(), floats.shape());
            let range = floats.iter().fold(0f32, |most, value| most.max(value.abs()));
            let worst = ours.iter().zip(floats).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            let mean = ours.iter().zip(floats).map(|(a, b)| (a - b).abs()).sum::<f32>() / ours.len() as f32;
            // A byte that falls to the other side of a tie is one step of 256 off, and moves its successors a little.
            assert!(worst <= range * 8.0 / 256.0 && mean <= range / 256.0, "{name}: {worst} {mean} of {range}");
        }
    }
}

#[test]
fn a_float_operator_between_two_islands_stays_with_tract() {
    // The QOperator twin leaves the transposed convolution in floats, with a quantized skip connection around it.
    let network = Network::load(&network("tiny-unet3-transposed.qop")).unwrap();
    assert!(!network.is_all_integer());
    let steps = network.explain();
    assert!(steps.iter().any(|step| step.place == "tract" && step.macs > 0), "{steps:#?}");
    assert!(steps.iter().filter(|step| step.place == "integer" && step.operator == "convolution").count() == 7);
}

#[test]
fn damaged_files_are_errors_and_never_a_panic() {
    let whole = network("tiny-unet2.qdq");
    for end in (0..whole.len()).step_by(211) {
        let _ = Network::load(&whole[..end]).map(|network| run(&network, 1));
    }
    let mut seed = 7u64;
    for _ in 0..150 {
        let mut bytes = whole.clone();
        for _ in 0..3 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (seed >> 33) as usize % bytes.len();
            bytes[at] = (seed >> 24) as u8;
        }
        if let Ok(network) = Network::load(&bytes) {
            let inputs = inputs(&network);
            let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
            let _ = network.session().unwrap().run(&Pool::new(1), &views);
        }
    }
}
