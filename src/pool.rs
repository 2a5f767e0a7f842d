//! A fixed number of named threads, and one way to share work among them. Knows no medicine.
//!
//! All heavy work of a process runs on one [`Pool`]; nothing else starts threads for computing. Results never depend
//! on the number of threads: tasks are numbered, write to places of their own, and are combined in their order.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

/// A panic inside a task: ours to mend, and caught here so that one study suffers and the others go on.
#[derive(Debug, Clone, thiserror::Error)]
#[error("internal fault: {0}")]
pub struct Fault(pub String);

impl Fault {
    /// The message of a caught panic.
    pub fn from_panic(payload: Box<dyn Any + Send>) -> Self {
        let text = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".into());
        Self(text)
    }
}

/// Tickets that may wait for a free thread. A ticket is an invitation to help, not work of its own, so a full queue
/// costs nothing but parallelism; without a bound a slow pool would collect invitations for ever.
const TICKETS_MAX: usize = 64;

/// More threads than this are a mistake in a configuration, not a board.
pub const THREADS_MAX: usize = 256;

/// Compiles a function twice on x86-64, with and without AVX2, and calls the one that the processor can run.
///
/// Vectors are wider, and nothing else changes: the compiler neither fuses nor reorders float operations, so the bits
/// are the same either way, and the same as on any other board. Elsewhere the function stays as it is.
macro_rules! widened {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident$(<$t:ident: $bound:path>)?($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        $visibility fn $name$(<$t: $bound>)?($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain$(<$t: $bound>)?($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide$(<$t: $bound>)?($($argument: $type),*) $(-> $result)? {
                    plain($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: `wide` is an ordinary function but for AVX2, which the line above found. No safe way
                    // calls it from code that may run without.
                    return unsafe { wide($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    };
}
pub(crate) use widened;

/// A fixed set of worker threads.
///
/// The thread that calls [`Pool::for_each`] works as well, so `Pool::new(1)` starts no thread at all, and a task may
/// itself call `for_each`: it can always finish on its own thread.
pub struct Pool {
    tickets: Option<Sender<Arc<Shared>>>,
    workers: Vec<JoinHandle<()>>,
    /// Records of calls that are over, to be used again: a network in steady state asks the allocator for nothing.
    spare: Mutex<Vec<Arc<Shared>>>,
    lane: Arc<Lane>,
}

/// Who works on what must not wait, and which helpers have stepped aside for it.
#[derive(Default)]
struct Lane {
    /// Urgent work under way; read before every task, so it costs one load.
    urgent: AtomicUsize,
    aside: AtomicUsize,
    turn: Mutex<()>,
    over: Condvar,
}

impl Lane {
    /// Whether a thread is to step aside: as many do as there is urgent work.
    fn calls(&self) -> bool {
        self.urgent.load(Ordering::Acquire) > self.aside.load(Ordering::Acquire)
    }

    /// Waits while urgent work is under way, if it calls for one more thread.
    fn step_aside(&self) {
        if !self.calls() {
            return;
        }
        let mut turn = self.turn.lock().expect("no code panics under this lock");
        if !self.calls() {
            return;
        }
        self.aside.fetch_add(1, Ordering::AcqRel);
        while self.urgent.load(Ordering::Acquire) > 0 {
            turn = self.over.wait(turn).expect("no code panics under this lock");
        }
        self.aside.fetch_sub(1, Ordering::AcqRel);
    }
}

/// While it lives, one of the pool's helpers stands aside: see [`Pool::urgent`].
pub struct Urgent<'p>(&'p Lane);

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        let _turn = self.0.turn.lock().expect("no code panics under this lock");
        if self.0.urgent.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.over.notify_all();
        }
    }
}

impl Pool {
    /// A pool that computes on `threads` threads (the caller's included), at least 1 and at most [`THREADS_MAX`].
    pub fn new(threads: usize) -> Self {
        let extra = threads.clamp(1, THREADS_MAX) - 1;
        let (tickets, queue) = bounded::<Arc<Shared>>(TICKETS_MAX);
        let lane = Arc::<Lane>::default();
        let workers = (0..extra)
            .map(|n| {
                let (queue, lane) = (queue.clone(), Arc::clone(&lane));
                std::thread::Builder::new()
                    .name(format!("scanside-work-{}", n + 1))
                    .spawn(move || queue.iter().for_each(|shared| shared.help(Some(&lane))))
                    .expect("the system has room for a few threads")
            })
            .collect();
        Self { tickets: Some(tickets), workers, spare: Mutex::new(Vec::new()), lane }
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Work that must not wait begins on the caller's own thread: until the guard is dropped, one helper of this pool stands
    /// aside at its next task and leaves its core. The threads that called [`Pool::for_each`] go on, so nothing stops,
    /// and nothing that is computed changes.
    pub fn urgent(&self) -> Urgent<'_> {
        self.lane.urgent.fetch_add(1, Ordering::AcqRel);
        Urgent(&self.lane)
    }

    /// For a thread beside the pool whose work can wait: stands aside as a helper does.
    pub fn step_aside(&self) {
        self.lane.step_aside();
    }

    /// Runs `task(0)`, `task(1)`, … `task(tasks - 1)`, each once, on all threads, and returns when all are done.
    ///
    /// # Errors
    /// The first task (by number) that panicked. The others still run: they may own parts of the output.
    pub fn for_each(&self, tasks: usize, task: impl Fn(usize) + Sync) -> Result<(), Fault> {
        if tasks == 0 {
            return Ok(());
        }
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. `Shared` calls the task between entering and leaving alone, nobody enters
        // once `close` has been called, and this function does not return before `close` has seen the last one leave.
        // So no call outlives the borrow. std's scoped threads would start threads for each call instead.
        let task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let spare = self.spare.lock().expect("no code panics under this lock").pop();
        let shared = spare.unwrap_or_default();
        shared.open(Job { task, tasks });
        for _ in 0..self.workers.len().min(tasks - 1) {
            let tickets = self.tickets.as_ref().expect("the queue lives as long as the pool");
            if tickets.try_send(Arc::clone(&shared)).is_err() {
                break;
            }
        }
        shared.help(None);
        let outcome = shared.close();
        self.spare.lock().expect("no code panics under this lock").push(shared);
        outcome
    }

    /// As [`Pool::for_each`], collecting what the tasks return, in their order.
    ///
    /// # Errors
    /// As [`Pool::for_each`].
    pub fn map<T: Send>(&self, tasks: usize, task: impl Fn(usize) -> T + Sync) -> Result<Vec<T>, Fault> {
        let slots: Vec<Mutex<Option<T>>> = (0..tasks).map(|_| Mutex::new(None)).collect();
        self.for_each(tasks, |n| {
            let value = task(n);
            *slots[n].lock().expect("each slot is locked once") = Some(value);
        })?;
        Ok(slots.into_iter().filter_map(|slot| slot.into_inner().ok().flatten()).collect())
    }

    /// Runs `task(n, chunk)` over consecutive chunks of `data`, `chunk_len` long (the last may be shorter).
    ///
    /// # Errors
    /// As [`Pool::for_each`].
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) -> Result<(), Fault> {
        let chunks: Vec<Mutex<&mut [T]>> = data.chunks_mut(chunk_len.max(1)).map(Mutex::new).collect();
        self.for_each(chunks.len(), |n| task(n, &mut chunks[n].lock().expect("each chunk is locked once")))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.tickets = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// One `for_each` in flight. A ticket may outlive it: then nobody gets in, or helps with the call that uses it next.
#[derive(Default)]
struct Shared {
    next: AtomicUsize,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    task: &'static (dyn Fn(usize) + Sync),
    tasks: usize,
}

#[derive(Default)]
struct State {
    /// While the call is open.
    job: Option<Job>,
    inside: usize,
    fault: Option<(usize, Fault)>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics under this lock")
    }

    fn open(&self, job: Job) {
        let mut state = self.state();
        self.next.store(0, Ordering::Relaxed);
        state.job = Some(job);
    }

    /// Does tasks until none is left. A helper leaves when urgent work calls, and comes back after it.
    fn help(&self, lane: Option<&Lane>) {
        loop {
            // Outside: one who waits inside would keep the work from being closed.
            if let Some(lane) = lane {
                lane.step_aside();
            }
            let Some(job) = self.enter() else { return };
            let done = self.work(&job, lane);
            self.state().inside -= 1;
            self.left.notify_all();
            if done {
                return;
            }
        }
    }

    /// Whether all tasks have been begun; else it was called away.
    fn work(&self, job: &Job, lane: Option<&Lane>) -> bool {
        loop {
            if lane.is_some_and(Lane::calls) {
                return false;
            }
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= job.tasks {
                return true;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (job.task)(n))) {
                let mut state = self.state();
                if state.fault.as_ref().is_none_or(|(first, _)| n < *first) {
                    state.fault = Some((n, Fault::from_panic(payload)));
                }
            }
        }
    }

    fn enter(&self) -> Option<Job> {
        let mut state = self.state();
        let job = state.job?;
        state.inside += 1;
        Some(job)
    }

    fn close(&self) -> Result<(), Fault> {
        let mut state = self.state();
        state.job = None;
        while state.inside > 0 {
            state = self.left.wait(state).expect("no code panics under this lock");
        }
        state.fault.take().map_or(Ok(()), |(_, fault)| Err(fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 8] {
            let pool = Pool::new(threads);
            let sum = AtomicU64::new(0);
            pool.for_each(1000, |n| {
                sum.fetch_add(n as u64, Ordering::Relaxed);
            })
            .unwrap();
            assert_eq!(sum.into_inner(), 999 * 1000 / 2);
            assert_eq!(pool.map(5, |n| n * n).unwrap(), [0, 1, 4, 9, 16]);
        }
    }

    #[test]
    fn a_panic_is_a_fault_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        let fault = pool.for_each(20, |n| assert!(n != 7 && n != 12, "task {n} is broken")).unwrap_err();
        assert_eq!(fault.0, "task 7 is broken");
        assert_eq!(pool.map(3, |n| n).unwrap(), [0, 1, 2]);
    }

    #[test]
    fn a_helper_stands_aside_while_urgent_work_is_under_way_and_then_comes_back() {
        let pool = Pool::new(2);
        let helped = |tasks: usize| {
            let caller = std::thread::current().id();
            let by_helper = AtomicU64::new(0);
            pool.for_each(tasks, |_| {
                std::thread::sleep(std::time::Duration::from_millis(2));
                by_helper.fetch_add(u64::from(std::thread::current().id() != caller), Ordering::Relaxed);
            })
            .unwrap();
            by_helper.into_inner()
        };
        let urgent = pool.urgent();
        // A helper that had looked just before may take one.
        assert!(helped(50) <= 1);
        drop(urgent);
        assert!(helped(50) > 5);
    }

    #[test]
    fn a_task_may_share_its_own_work() {
        let pool = Pool::new(2);
        let sums = pool.map(4, |a| pool.map(10, |b| a * b).unwrap().iter().sum::<usize>()).unwrap();
        assert_eq!(sums, [0, 45, 90, 135]);
    }
}
