//! What networks ask of the allocator: nothing in steady state, and nothing large for a damaged file.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ndarray::{ArrayD, IxDyn};
use scanside::infer::engine::Network;
use scanside::pool::Pool;

static ASKED: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator, called as it was asked; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The counts are of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn a_network_in_integers_allocates_nothing_in_steady_state_on_any_number_of_threads() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let networks = ["tiny-unet3-transposed.qdq", "tiny-retina.qdq", "tiny-densenet.qop"].map(|name| format!("tests/data/networks/{name}.onnx"));
    // The last one has layers that are worth a second thread.
    for name in networks.into_iter().chain(["models/lung-seg/model.onnx".to_owned()]) {
        let network = Network::load(&file(&name)).unwrap();
        let inputs: Vec<_> = network.input_shapes().iter().map(|shape| ArrayD::from_elem(IxDyn(shape), 0.5)).collect();
        let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let mut session = network.session().unwrap();
            let mut outputs = session.run(&pool, &views).unwrap();
            // The first few runs may find workers that have not waited for work before.
            (0..20).for_each(|_| session.run_into(&pool, &views, &mut outputs).unwrap());
            // The test harness has a thread of its own that may speak up at any time: the quietest of a few rounds counts.
            let least = (0..5).map(|_| {
                let before = ASKED.load(Ordering::Relaxed);
                (0..10).for_each(|_| session.run_into(&pool, &views, &mut outputs).unwrap());
                ASKED.load(Ordering::Relaxed) - before
            });
            assert_eq!(least.min(), Some(0), "{name} on {threads} threads");
        }
    }
}

#[test]
fn planning_a_damaged_file_never_asks_for_much() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut seed = 11u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let (mut planned, mut refused) = (0, 0);
    for name in ["tiny-odd.qdq", "tiny-unet3-transposed.qop", "tiny-densenet.qop", "tiny-retina.qdq"] {
        let whole = file(&format!("tests/data/networks/{name}.onnx"));
        for round in 0..150 {
            let mut bytes = whole.clone();
            for _ in 0..1 + round % 4 {
                let at = random() % bytes.len();
                match random() % 3 {
                    0 => bytes[at] ^= 1 << (random() % 8),
                    1 => bytes[at] = [0, 1, 127, 128, 255][random() % 5],
                    _ => drop(bytes.drain(at..(at + 1 + random() % 9).min(bytes.len()))),
                }
            }
            LARGEST.store(0, Ordering::Relaxed);
            match Network::load(&bytes) {
                Ok(_) => planned += 1,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                }
            }
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest < 64 << 20, "{name}, round {round}: {largest} bytes at once");
        }
    }
    assert!(planned > 50 && refused > 50, "{planned} were planned and {refused} refused: the damage is of one kind");
}
