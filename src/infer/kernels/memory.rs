//! The memory of one run: an arena for activations, and scratch for each thread.

/// Alignment of everything the plan places: a cache line.
pub(super) const LINE: usize = 64;

/// Bytes after each tensor that belong to it, so that a kernel may read whole words at its end.
pub(super) const SLACK: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Memory of one session; made once, used by every run.
pub struct Memory {
    arena: Vec<Line>,
    scratch: Vec<Line>,
    scratch_each: usize,
}

impl Memory {
    /// Room for an arena of `arena` bytes, and `scratch` bytes for each of `threads` threads.
    ///
    /// # Errors
    /// Nothing to be had from the system.
    pub(super) fn new(arena: usize, scratch: usize, threads: usize) -> Result<Self, std::collections::TryReserveError> {
        let mut memory = Self { arena: lines(arena)?, scratch: Vec::new(), scratch_each: scratch.next_multiple_of(LINE) };
        memory.provide(threads)?;
        Ok(memory)
    }

    /// Makes scratch for more threads, if there is not enough.
    pub(super) fn provide(&mut self, threads: usize) -> Result<(), std::collections::TryReserveError> {
        let bytes = self.scratch_each * threads;
        if self.scratch.len() * LINE < bytes {
            self.scratch = lines(bytes)?;
        }
        Ok(())
    }

    /// Whether this memory was made for such sizes.
    pub(super) fn holds(&self, arena: usize, scratch: usize) -> bool {
        self.arena.len() * LINE >= arena && self.scratch_each >= scratch
    }

    /// Pointers to the arena and to the scratch of the first thread.
    pub(super) fn pointers(&mut self) -> Pointers {
        Pointers {
            arena: self.arena.as_mut_ptr().cast(),
            scratch: self.scratch.as_mut_ptr().cast(),
            scratch_each: self.scratch_each,
        }
    }
}

fn lines(bytes: usize) -> Result<Vec<Line>, std::collections::TryReserveError> {
    let count = bytes.div_ceil(LINE);
    let mut lines = Vec::new();
    lines.try_reserve_exact(count)?;
    lines.resize(count, Line([0; LINE]));
    Ok(lines)
}

/// Where one run works. Threads share it; the plan gives each unit of work bytes of its own to write.
#[derive(Clone, Copy)]
pub(super) struct Pointers {
    arena: *mut u8,
    scratch: *mut u8,
    scratch_each: usize,
}

// SAFETY: the pointers come from a `Memory` that is borrowed exclusively for the whole run, and what is written through
// them is disjoint between units of work: each unit of a layer writes rows of its own, and each thread its own scratch.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}

impl Pointers {
    /// The tensor at `offset` of the arena.
    ///
    /// # Safety
    /// `offset` lies in the arena.
    pub(super) unsafe fn at(self, offset: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.arena.add(offset) }
    }

    /// Scratch of one thread.
    ///
    /// # Safety
    /// `thread` is one of those provided for.
    pub(super) unsafe fn scratch(self, thread: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.scratch.add(thread * self.scratch_each) }
    }
}
