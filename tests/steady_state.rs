//! A network in steady state asks the allocator for nothing. One test, alone in its process: it counts for all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ndarray::{ArrayD, IxDyn};
use scanside::infer::engine::Network;
use scanside::pool::Pool;

static ASKED: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator, called as it was asked; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Ordering::Relaxed);
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

#[test]
fn a_network_in_integers_allocates_nothing_in_steady_state_on_any_number_of_threads() {
    let networks = ["tiny-unet3-transposed.qdq", "tiny-retina.qdq", "tiny-densenet.qop"].map(|name| format!("tests/data/networks/{name}.onnx"));
    // The last one has layers that are worth a second thread.
    for name in networks.into_iter().chain(["models/lung-seg/model.onnx".to_owned()]) {
        let file = format!("{}/{name}", env!("CARGO_MANIFEST_DIR"));
        let network = Network::load(&std::fs::read(file).unwrap()).unwrap();
        let inputs: Vec<_> = network.input_shapes().iter().map(|shape| ArrayD::from_elem(IxDyn(shape), 0.5)).collect();
        let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let mut session = network.session().unwrap();
            let mut outputs = session.run(&pool, &views).unwrap();
            // The first few runs may find workers that have not waited for work before.
            (0..20).for_each(|_| session.run_into(&pool, &views, &mut outputs).unwrap());
            let before = ASKED.load(Ordering::Relaxed);
            (0..50).for_each(|_| session.run_into(&pool, &views, &mut outputs).unwrap());
            assert_eq!(ASKED.load(Ordering::Relaxed) - before, 0, "{name} on {threads} threads");
        }
    }
}
