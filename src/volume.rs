//! Voxels on disk, mapped into memory: written once slice by slice, read by many. The only user of memmap2.
//!
//! A [`VolumeWriter`] owns the spool file and writes with `pwrite`; [`Volume`]s read it through a read-only map. A slice
//! handed out is never written again (a second write to it is refused), so a reader sees no change under its feet.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memmap2::Mmap;
use ndarray::{Array3, ArrayView2, ArrayView3};

use crate::geometry::{Affine, Grid, Spacing};

/// What one voxel is on disk and in memory, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VoxelType {
    /// 8-bit unsigned.
    U8,
    /// 8-bit signed.
    I8,
    /// 16-bit unsigned.
    U16,
    /// 16-bit signed.
    I16,
    /// 32-bit unsigned.
    U32,
    /// 32-bit signed.
    I32,
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
}

impl VoxelType {
    /// Bytes of one voxel.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A number a voxel can be. Any bit pattern is a value, so bytes of a file may be read as voxels.
pub trait Voxel: sealed::Sealed + Copy + Default + PartialOrd + Send + Sync + std::fmt::Debug + 'static {
    /// Its type tag.
    const TYPE: VoxelType;
    /// As a real number (32-bit integers round to 24 bits).
    fn to_f32(self) -> f32;
    /// As a real number.
    fn to_f64(self) -> f64;
    /// The nearest value of this type; NaN becomes zero in the integer types.
    fn from_f64(value: f64) -> Self;
}

macro_rules! voxel {
    ($($t:ty, $tag:ident, $round:expr;)*) => {$(
        impl sealed::Sealed for $t {}
        impl Voxel for $t {
            const TYPE: VoxelType = VoxelType::$tag;
            fn to_f32(self) -> f32 { self as f32 }
            fn to_f64(self) -> f64 { self as f64 }
            fn from_f64(value: f64) -> Self { let round: fn(f64) -> f64 = $round; round(value) as $t }
        }
    )*};
}
voxel! {
    u8, U8, f64::round; i8, I8, f64::round; u16, U16, f64::round; i16, I16, f64::round;
    u32, U32, f64::round; i32, I32, f64::round; f32, F32, |v| v; f64, F64, |v| v;
}

/// The voxels as their bytes in memory, which is how files keep them.
pub fn bytes_of_voxels<T: Voxel>(voxels: &[T]) -> &[u8] {
    // SAFETY: the sealed `Voxel` types are plain numbers without padding, and bytes have no alignment. Converting one by one
    // would cost a copy of every volume that is written.
    unsafe { std::slice::from_raw_parts(voxels.as_ptr().cast(), size_of_val(voxels)) }
}

/// Runs `$body` with `$t` bound to the Rust type of a [`VoxelType`].
#[macro_export]
macro_rules! with_voxel_type {
    ($tag:expr, $t:ident => $body:expr) => {
        match $tag {
            $crate::volume::VoxelType::U8 => { type $t = u8; $body }
            $crate::volume::VoxelType::I8 => { type $t = i8; $body }
            $crate::volume::VoxelType::U16 => { type $t = u16; $body }
            $crate::volume::VoxelType::I16 => { type $t = i16; $body }
            $crate::volume::VoxelType::U32 => { type $t = u32; $body }
            $crate::volume::VoxelType::I32 => { type $t = i32; $body }
            $crate::volume::VoxelType::F32 => { type $t = f32; $body }
            $crate::volume::VoxelType::F64 => { type $t = f64; $body }
        }
    };
}

/// Stored values to real ones: `real = stored * slope + intercept` (PS3.3 C.11.1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rescale {
    /// Rescale Slope (0028,1053); finite, not zero.
    pub slope: f64,
    /// Rescale Intercept (0028,1052); finite.
    pub intercept: f64,
}

impl Rescale {
    /// Stored values are the real ones.
    pub const IDENTITY: Self = Self { slope: 1.0, intercept: 0.0 };

    /// The real value.
    pub fn apply(self, stored: f64) -> f64 {
        stored * self.slope + self.intercept
    }
}

/// The disk or the map would not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The system's answer, with the file and what was done to it.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// `create`, `reserve`, `write`, `map`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk is full: said before a study is accepted.
    #[error("no room for {bytes} bytes at {}", path.display())]
    NoRoom {
        /// What was wanted.
        bytes: u64,
        /// The file.
        path: PathBuf,
    },
    /// A shape whose size in bytes does not fit.
    #[error("a volume of {0:?} voxels is larger than this system can address")]
    TooLarge([usize; 3]),
    /// The same slice twice, a slice outside, or bytes of the wrong length: a caller's mistake.
    #[error("slice {slice} cannot be written: {why}")]
    BadSlice {
        /// Which.
        slice: usize,
        /// Why not.
        why: &'static str,
    },
}

/// Volumes up to this size are built in memory: a file for them would cost more than it saves.
const HEAP_BYTES_MAX: usize = 16 << 20;

/// Where temporary volumes go: `TMPDIR`, else `/var/tmp`, which is a disk where `/tmp` may be memory.
pub fn temporary_folder() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(folder) => folder.into(),
        None if Path::new("/var/tmp").is_dir() => "/var/tmp".into(),
        None => std::env::temp_dir(),
    }
}

/// Bytes of a volume, checked.
fn bytes_of(shape: [usize; 3], voxel: VoxelType) -> Result<usize, VolumeError> {
    shape
        .iter()
        .try_fold(voxel.bytes(), |n, s| n.checked_mul(*s))
        .filter(|n| *n <= isize::MAX as usize)
        .ok_or(VolumeError::TooLarge(shape))
}

/// Where slices are written, once each and in any order.
///
/// Dropping the writer leaves the file; whoever made the path removes it.
#[derive(Debug)]
pub struct VolumeWriter {
    file: File,
    path: PathBuf,
    volume: Volume,
    claimed: Vec<AtomicBool>,
    slice_bytes: usize,
    /// Slices whose room on the disk is reserved.
    reserved: Mutex<usize>,
}

/// Slices reserved at a time where their number is not known beforehand: few, so that a stray image costs little; many
/// enough that the file lies in few pieces.
const RESERVE_SLICES: usize = 16;

impl VolumeWriter {
    /// Creates the file, reserves its room on the disk and maps it.
    ///
    /// # Errors
    /// [`VolumeError::NoRoom`] when the disk cannot hold it, [`VolumeError::Io`] for everything else the system refuses,
    /// an existing file among them.
    pub fn create(path: &Path, grid: Grid, voxel: VoxelType, rescale: Rescale) -> Result<Self, VolumeError> {
        Self::create_reserving(path, grid, voxel, rescale, grid.shape[0])
    }

    /// As [`VolumeWriter::create`] for a series whose length is not known: `grid` tells the most slices there may be, and
    /// room is reserved as they come. A full disk then shows as [`VolumeError::NoRoom`] at a slice.
    ///
    /// # Errors
    /// As [`VolumeWriter::create`].
    pub fn create_growing(path: &Path, grid: Grid, voxel: VoxelType, rescale: Rescale) -> Result<Self, VolumeError> {
        Self::create_reserving(path, grid, voxel, rescale, grid.shape[0].min(1))
    }

    fn create_reserving(
        path: &Path,
        grid: Grid,
        voxel: VoxelType,
        rescale: Rescale,
        slices: usize,
    ) -> Result<Self, VolumeError> {
        let io = |doing| move |source| VolumeError::Io { doing, path: path.to_owned(), source };
        let bytes = bytes_of(grid.shape, voxel)?;
        let slice_bytes = bytes / grid.shape[0].max(1);
        let file = File::options().read(true).write(true).create_new(true).open(path).map_err(io("create"))?;
        // The whole length first, as a hole: a map beyond the end of a file is a crash, a hole reads as zeros.
        let sized = rustix::fs::ftruncate(&file, bytes as u64).map_err(|errno| reserve_error(errno, path, bytes));
        let reserved = sized.and_then(|()| reserve(&file, path, 0, slices * slice_bytes));
        let mapped = reserved.and_then(|()| map(&file, path));
        let map = mapped.inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })?;
        let voxels = Store::Map(Arc::new(MapStore::new(map, 0, written_flags(grid.shape[0]))));
        let claimed = written_flags(grid.shape[0]);
        let volume = Volume { grid, voxel, rescale, store: voxels, slots: None };
        Ok(Self { file, path: path.to_owned(), volume, claimed, slice_bytes, reserved: Mutex::new(slices) })
    }

    /// Writes slice `k`: rows of columns, little endian, exactly one slice long. Callable from several threads.
    ///
    /// # Errors
    /// [`VolumeError::BadSlice`] for a slice outside, of the wrong length or already written; [`VolumeError::NoRoom`]
    /// and [`VolumeError::Io`] from the disk.
    pub fn write_slice(&self, k: usize, bytes: &[u8]) -> Result<(), VolumeError> {
        let bad = |why| VolumeError::BadSlice { slice: k, why };
        let claimed = self.claimed.get(k).ok_or_else(|| bad("there is no such slice"))?;
        if bytes.len() != self.slice_bytes {
            return Err(bad("its length is not that of a slice"));
        }
        if claimed.swap(true, Ordering::AcqRel) {
            return Err(bad("it has been written before"));
        }
        self.reserve_for(k).inspect_err(|_| claimed.store(false, Ordering::Release))?;
        self.file.write_all_at(bytes, (k * self.slice_bytes) as u64).map_err(|source| {
            claimed.store(false, Ordering::Release);
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    VolumeError::NoRoom { bytes: self.slice_bytes as u64, path: self.path.clone() }
                }
                _ => VolumeError::Io { doing: "write", path: self.path.clone(), source },
            }
        })?;
        let Store::Map(map) = &self.volume.store else { unreachable!("a writer's volume is mapped") };
        map.written[k].store(true, Ordering::Release);
        Ok(())
    }

    fn reserve_for(&self, k: usize) -> Result<(), VolumeError> {
        let mut reserved = self.reserved.lock().expect("nothing panics while it is held");
        if k >= *reserved {
            let until = (k + 1).next_multiple_of(RESERVE_SLICES).min(self.claimed.len());
            reserve(&self.file, &self.path, *reserved * self.slice_bytes, (until - *reserved) * self.slice_bytes)?;
            *reserved = until;
        }
        Ok(())
    }

    /// A reader of the volume as it grows: [`Volume::is_written`] tells which slices may be read.
    pub fn reader(&self) -> Volume {
        self.volume.clone()
    }

    /// The spool file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn reserve(file: &File, path: &Path, at: usize, bytes: usize) -> Result<(), VolumeError> {
    if bytes == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), at as u64, bytes as u64) {
        // A file system that cannot reserve (FAT on a stick): a full disk then shows at write.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(reserve_error(errno, path, bytes)),
    }
}

fn reserve_error(errno: rustix::io::Errno, path: &Path, bytes: usize) -> VolumeError {
    match errno {
        rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT | rustix::io::Errno::FBIG => {
            VolumeError::NoRoom { bytes: bytes as u64, path: path.to_owned() }
        }
        other => VolumeError::Io { doing: "reserve", path: path.to_owned(), source: other.into() },
    }
}

fn written_flags(slices: usize) -> Vec<AtomicBool> {
    (0..slices).map(|_| AtomicBool::new(false)).collect()
}

fn map(file: &File, path: &Path) -> Result<Mmap, VolumeError> {
    // SAFETY: a map is undefined when the file shrinks or changes under a reader. The file was created by us under a
    // name nobody else uses (`create_new`), or is an input that its owner leaves alone while a tool reads it (said where it is
    // opened; the service never maps an input). No code truncates it while a map lives, and slices are written at most
    // once, before readers may look (`written`).
    // No safe way offers slices of a file larger than memory.
    unsafe { Mmap::map(file) }.map_err(|source| VolumeError::Io { doing: "map", path: path.to_owned(), source })
}

/// A whole file as bytes, for inputs too large to copy into memory. Only for files a person opens with a tool and leaves
/// alone meanwhile.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn open(path: &Path) -> Result<Self, VolumeError> {
        let file = File::open(path).map_err(|source| VolumeError::Io { doing: "open", path: path.to_owned(), source })?;
        map(&file, path).map(Self)
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Voxels, affine and rescale, never apart. Cheap to clone: the voxels are shared.
#[derive(Debug, Clone)]
pub struct Volume {
    grid: Grid,
    voxel: VoxelType,
    rescale: Rescale,
    store: Store,
    /// Which slice of the store each slice is; None where they are the same.
    slots: Option<Arc<[u32]>>,
}

#[derive(Debug, Clone)]
enum Store {
    Map(Arc<MapStore>),
    Heap(Arc<Vec<u64>>),
}

#[derive(Debug)]
struct MapStore {
    map: Mmap,
    /// Where the first voxel is.
    at: usize,
    written: Vec<AtomicBool>,
    /// Slices read since the map was last given back, and how many bytes they are.
    touched: Vec<AtomicBool>,
    touched_bytes: AtomicUsize,
}

/// Bytes of a mapped volume that stay in this process's memory at most; above it the whole map is given back to the
/// kernel, and what is still in use comes back from the page cache. Whatever a reader does, a volume of 2,000 slices
/// then takes no more memory than one of 200.
const RESIDENT_BYTES_MAX: usize = 16 << 20;

impl MapStore {
    fn new(map: Mmap, at: usize, written: Vec<AtomicBool>) -> Self {
        let touched = written_flags(written.len());
        Self { map, at, written, touched, touched_bytes: AtomicUsize::new(0) }
    }

    /// A slice is about to be read.
    fn touch(&self, slot: usize, slice_bytes: usize) {
        let Some(touched) = self.touched.get(slot) else { return };
        if touched.load(Ordering::Relaxed) || touched.swap(true, Ordering::Relaxed) {
            return;
        }
        if self.touched_bytes.fetch_add(slice_bytes, Ordering::Relaxed) + slice_bytes > RESIDENT_BYTES_MAX {
            self.give_back(0..self.touched.len(), slice_bytes);
        }
    }

    /// Drops the pages of these slots from the process.
    fn give_back(&self, slots: Range<usize>, slice_bytes: usize) {
        let end = slots.end.min(self.written.len());
        let slots = slots.start.min(end)..end;
        let page = page_bytes();
        // Inner pages only: the outer ones are shared with neighbours that may be in use.
        let start = (self.at + slots.start * slice_bytes).next_multiple_of(page);
        let end = (self.at + slots.end * slice_bytes) / page * page;
        for touched in &self.touched[slots] {
            if touched.swap(false, Ordering::Relaxed) {
                self.touched_bytes.fetch_sub(slice_bytes, Ordering::Relaxed);
            }
        }
        if start < end {
            // SAFETY: on a shared, file-backed, read-only map MADV_DONTNEED only drops the pages from this process;
            // the next read faults them in from the file with the same content.
            let advised =
                unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            if let Err(error) = advised {
                log::debug!("madvise: {error}");
            }
        }
    }
}

impl Volume {
    /// A volume in memory.
    ///
    /// # Errors
    /// [`VolumeError::TooLarge`] when its size in bytes does not fit.
    pub fn from_array<T: Voxel>(voxels: &Array3<T>, affine: Affine, rescale: Rescale) -> Result<Self, VolumeError> {
        let (z, y, x) = voxels.dim();
        let shape = [z, y, x];
        let mut words = vec![0u64; bytes_of(shape, T::TYPE)?.div_ceil(8)];
        // SAFETY: `words` is at least as long as the voxels, aligned for any of them, and freshly owned; every bit
        // pattern is a value of the sealed `Voxel` types. One allocation of one kind keeps `Store` free of generics.
        let target = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<T>(), voxels.len()) };
        for (to, from) in target.iter_mut().zip(voxels.iter()) {
            *to = *from;
        }
        Ok(Self { grid: Grid { shape, affine }, voxel: T::TYPE, rescale, store: Store::Heap(Arc::new(words)), slots: None })
    }

    /// A volume filled slice by slice: in memory while it is small, else in a temporary file that has no name and is gone
    /// with the volume. `fill(k, bytes)` gets the room of slice k and puts little-endian voxels there.
    ///
    /// # Errors
    /// [`VolumeError`] as of [`VolumeWriter`], and whatever `fill` fails with.
    pub fn build<E: From<VolumeError>>(
        grid: Grid,
        voxel: VoxelType,
        rescale: Rescale,
        mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let bytes = bytes_of(grid.shape, voxel)?;
        let slice_bytes = bytes / grid.shape[0].max(1);
        if bytes <= HEAP_BYTES_MAX {
            let mut words = vec![0u64; bytes.div_ceil(8)];
            // SAFETY: the words are freshly owned, longer than `bytes`, and every byte pattern is a word.
            let room = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), bytes) };
            for k in 0..grid.shape[0] {
                fill(k, &mut room[k * slice_bytes..(k + 1) * slice_bytes])?;
            }
            return Ok(Self { grid, voxel, rescale, store: Store::Heap(Arc::new(words)), slots: None });
        }
        static FILES: AtomicUsize = AtomicUsize::new(0);
        let name = format!("scanside-{}-{}.raw", std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
        let path = temporary_folder().join(name);
        let writer = VolumeWriter::create(&path, grid, voxel, rescale)?;
        let _ = std::fs::remove_file(&path);
        let mut slice = vec![0; slice_bytes];
        for k in 0..grid.shape[0] {
            fill(k, &mut slice)?;
            writer.write_slice(k, &slice)?;
        }
        Ok(writer.reader())
    }

    /// Maps a finished spool file.
    ///
    /// # Errors
    /// [`VolumeError::Io`] when it cannot be opened or is shorter than `grid` says.
    pub fn open(path: &Path, grid: Grid, voxel: VoxelType, rescale: Rescale) -> Result<Self, VolumeError> {
        Self::open_at(path, 0, grid, voxel, rescale)
    }

    /// Maps a file whose voxels start at byte `at`, a multiple of their size. For files a person opens with a tool and leaves alone
    /// meanwhile; the service copies into its spool instead.
    ///
    /// # Errors
    /// [`VolumeError::Io`] when it cannot be opened, is shorter than `grid` says, or `at` is no such multiple.
    pub fn open_at(
        path: &Path,
        at: usize,
        grid: Grid,
        voxel: VoxelType,
        rescale: Rescale,
    ) -> Result<Self, VolumeError> {
        let io = |doing| move |source| VolumeError::Io { doing, path: path.to_owned(), source };
        let file = File::open(path).map_err(io("open"))?;
        let map = map(&file, path)?;
        if at % voxel.bytes() != 0 {
            return Err(io("map")(io::Error::new(io::ErrorKind::InvalidInput, "the voxels are not aligned")));
        }
        let bytes = bytes_of(grid.shape, voxel)?;
        if map.len().checked_sub(at).is_none_or(|rest| rest < bytes) {
            return Err(io("map")(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than the volume")));
        }
        let written = (0..grid.shape[0]).map(|_| AtomicBool::new(true)).collect();
        Ok(Self { grid, voxel, rescale, store: Store::Map(Arc::new(MapStore::new(map, at, written))), slots: None })
    }

    /// The same voxels with their slices in another order: slice k of the result is slice `slots[k]` of what was written.
    /// Nothing is copied. A slot may be named more than once.
    ///
    /// # Errors
    /// [`VolumeError::BadSlice`] for a slot that is not written, or a number of slots or a slice shape that does not fit `grid`.
    pub fn arranged(&self, grid: Grid, slots: &[usize], rescale: Rescale) -> Result<Self, VolumeError> {
        let bad = |slice, why| Err(VolumeError::BadSlice { slice, why });
        if grid.shape[0] != slots.len() || grid.shape[1..] != self.grid.shape[1..] || self.slots.is_some() {
            return bad(slots.len(), "the arrangement does not fit the volume");
        }
        if let Some(slot) = slots.iter().find(|slot| !self.is_written(**slot)) {
            return bad(*slot, "it has not been written");
        }
        let in_order = slots.iter().enumerate().all(|(k, slot)| k == *slot);
        let slots = (!in_order).then(|| slots.iter().map(|slot| *slot as u32).collect());
        Ok(Self { grid, voxel: self.voxel, rescale, store: self.store.clone(), slots })
    }

    /// Some neighbouring slices as a volume of their own. Nothing is copied.
    ///
    /// # Panics
    /// When `slices` reaches outside.
    pub fn part(&self, slices: Range<usize>) -> Self {
        let [z, y, x] = self.grid.shape;
        assert!(slices.start <= slices.end && slices.end <= z, "slices {slices:?} of {z}");
        let affine = self.grid.affine.shifted([0.0, 0.0, slices.start as f64]);
        let slots = slices.clone().map(|k| self.slot(k) as u32).collect();
        Self { grid: Grid { shape: [slices.len(), y, x], affine }, slots: Some(slots), ..self.clone() }
    }

    /// Whether slices lie one after the other, so that [`Volume::stored`] can show them as one array.
    pub fn is_contiguous(&self) -> bool {
        self.slots.is_none()
    }

    fn slot(&self, k: usize) -> usize {
        match &self.slots {
            None => k,
            Some(slots) => slots.get(k).map_or(usize::MAX, |slot| *slot as usize),
        }
    }

    /// Shape and place.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// `[slices, rows, columns]`.
    pub fn shape(&self) -> [usize; 3] {
        self.grid.shape
    }

    /// `(i, j, k)` to LPS millimetres.
    pub fn affine(&self) -> Affine {
        self.grid.affine
    }

    /// Distance between voxel centres.
    pub fn spacing(&self) -> Spacing {
        self.grid.spacing()
    }

    /// What is stored.
    pub fn voxel_type(&self) -> VoxelType {
        self.voxel
    }

    /// From stored to real values.
    pub fn rescale(&self) -> Rescale {
        self.rescale
    }

    /// The same voxels, placed elsewhere.
    pub fn with_affine(mut self, affine: Affine) -> Self {
        self.grid.affine = affine;
        self
    }

    /// Whether slice `k` may be read.
    pub fn is_written(&self, k: usize) -> bool {
        match &self.store {
            Store::Map(m) => m.written.get(self.slot(k)).is_some_and(|w| w.load(Ordering::Acquire)),
            Store::Heap(_) => k < self.grid.shape[0],
        }
    }

    /// The stored values of all slices, or None when `T` is not their type or the slices lie in another order
    /// ([`Volume::is_contiguous`]).
    ///
    /// Slices not yet written read as zero and may change: ask [`Volume::is_written`] before.
    pub fn stored<T: Voxel>(&self) -> Option<ArrayView3<'_, T>> {
        let [z, y, x] = self.grid.shape;
        (T::TYPE == self.voxel && self.is_contiguous()).then(|| {
            ArrayView3::from_shape((z, y, x), self.slab::<T>(0..z)).expect("the slice has the volume's length")
        })
    }

    /// The stored values of slice `k`, or None when `T` is not their type.
    pub fn stored_slice<T: Voxel>(&self, k: usize) -> Option<ArrayView2<'_, T>> {
        let [_, y, x] = self.grid.shape;
        (T::TYPE == self.voxel).then(|| {
            ArrayView2::from_shape((y, x), self.one::<T>(k)).expect("the slice has its own length")
        })
    }

    fn one<T: Voxel>(&self, k: usize) -> &[T] {
        assert!(k < self.grid.shape[0], "slice {k} of {}", self.grid.shape[0]);
        let slot = self.slot(k);
        if let Store::Map(m) = &self.store {
            m.touch(slot, self.slice_bytes());
        }
        self.slab(slot..slot + 1)
    }

    /// Slots, not slices.
    fn slab<T: Voxel>(&self, slices: Range<usize>) -> &[T] {
        let [z, y, x] = self.grid.shape;
        let (base, slots) = match &self.store {
            // SAFETY: `at` lies inside the map (checked when it was opened).
            Store::Map(m) => (unsafe { m.map.as_ptr().add(m.at) }, m.written.len()),
            Store::Heap(words) => (words.as_ptr().cast(), z),
        };
        assert!(T::TYPE == self.voxel && slices.start <= slices.end && slices.end <= slots);
        // SAFETY: both stores hold at least z * y * x voxels of this type (checked on construction), start page- or
        // word-aligned, and live as long as `self`; every bit pattern is a value. The spool is little endian, as are
        // all boards supported.
        unsafe {
            std::slice::from_raw_parts(base.cast::<T>().add(slices.start * y * x), (slices.end - slices.start) * y * x)
        }
    }

    /// Real values of slice `k` (rescaled), row by row.
    ///
    /// # Panics
    /// When `out` is not one slice long or `k` is outside.
    pub fn read_slice_f32(&self, k: usize, out: &mut [f32]) {
        let Rescale { slope, intercept } = self.rescale;
        let (a, b) = (slope as f32, intercept as f32);
        with_voxel_type!(self.voxel, T => {
            let stored = self.one::<T>(k);
            assert_eq!(stored.len(), out.len());
            for (o, v) in out.iter_mut().zip(stored) {
                *o = v.to_f32() * a + b;
            }
        });
    }

    /// Real values of some slices (rescaled).
    pub fn to_f32(&self, slices: Range<usize>) -> Array3<f32> {
        let [_, y, x] = self.grid.shape;
        let mut out = Array3::zeros((slices.len(), y, x));
        for (mut slice, k) in out.outer_iter_mut().zip(slices) {
            self.read_slice_f32(k, slice.as_slice_mut().expect("a fresh array is contiguous"));
        }
        out
    }

    /// Tells the kernel that these slices are not needed in memory for now; reading them again reads the disk.
    pub fn release(&self, slices: Range<usize>) {
        if self.slots.is_some() {
            for k in slices {
                let slot = self.slot(k);
                self.release_slots(slot..slot + 1);
            }
        } else {
            self.release_slots(slices);
        }
    }

    fn release_slots(&self, slots: Range<usize>) {
        if let Store::Map(m) = &self.store {
            m.give_back(slots, self.slice_bytes());
        }
    }

    fn slice_bytes(&self) -> usize {
        self.grid.shape[1] * self.grid.shape[2] * self.voxel.bytes()
    }
}

fn page_bytes() -> usize {
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    match PAGE.load(Ordering::Relaxed) {
        0 => {
            let page = rustix::param::page_size();
            PAGE.store(page, Ordering::Relaxed);
            page
        }
        page => page,
    }
}
