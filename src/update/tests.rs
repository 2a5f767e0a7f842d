//! A disk that loses power: what was not synced is lost, kept or torn, and whoever boots afterwards finds a whole slot.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::rc::Rc;

use super::disk::NewFile;
use super::*;
use crate::infer::signature::PrivateKey;

/// What becomes of things that nobody has synced when the power goes.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Lost,
    Kept,
    /// Each name and each file by itself, and a file perhaps in part.
    Drawn(u64),
}

#[derive(Clone, Default)]
struct Inode {
    now: Vec<u8>,
    safe: Vec<u8>,
}

/// Names and files as a running system sees them, and as the medium holds them.
#[derive(Clone, Default)]
struct Medium {
    now: BTreeMap<PathBuf, Option<usize>>,
    safe: BTreeMap<PathBuf, Option<usize>>,
    inodes: Vec<Inode>,
    /// Steps until the power goes: one for each name changed, each thing synced, and each byte written.
    steps_left: u64,
}

#[derive(Clone)]
struct MemoryDisk(Rc<RefCell<Medium>>);

struct MemoryFile<'d>(&'d MemoryDisk, usize);

impl MemoryDisk {
    fn new() -> Self {
        let medium = Medium { steps_left: u64::MAX, ..Medium::default() };
        Self(Rc::new(RefCell::new(medium)))
    }

    fn copy(&self) -> Self {
        Self(Rc::new(RefCell::new(self.0.borrow().clone())))
    }

    fn step(&self) -> io::Result<()> {
        let mut medium = self.0.borrow_mut();
        match medium.steps_left {
            0 => Err(io::Error::other("the power is gone")),
            left => {
                medium.steps_left = left - 1;
                Ok(())
            }
        }
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let mut medium = self.0.borrow_mut();
        let id = medium.inodes.len();
        medium.inodes.push(Inode { now: bytes.to_vec(), safe: bytes.to_vec() });
        for folder in Path::new(path).ancestors().skip(1) {
            medium.now.insert(folder.to_owned(), None);
            medium.safe.insert(folder.to_owned(), None);
        }
        medium.now.insert(path.into(), Some(id));
        medium.safe.insert(path.into(), Some(id));
    }

    fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        let medium = self.0.borrow();
        medium.now.get(Path::new(path)).copied().flatten().map(|id| medium.inodes[id].now.clone())
    }

    /// The machine starts again with what is on the medium.
    fn power_cut(&self, fate: Fate) {
        let mut medium = self.0.borrow_mut();
        let mut seed = if let Fate::Drawn(seed) = fate { seed } else { 0 };
        let mut draw = move |sides: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % sides
        };
        let mut names = BTreeMap::new();
        let all: BTreeSet<PathBuf> = medium.now.keys().chain(medium.safe.keys()).cloned().collect();
        for path in all {
            let (now, safe) = (medium.now.get(&path).copied(), medium.safe.get(&path).copied());
            let kept = match fate {
                Fate::Lost => false,
                Fate::Kept => true,
                Fate::Drawn(_) => draw(2) == 0,
            };
            if let Some(node) = if kept { now } else { safe } {
                names.insert(path, node);
            }
        }
        // A name is only found through the folders above it.
        let folders = names.clone();
        names.retain(|path, _| path.ancestors().skip(1).all(|above| folders.contains_key(above)));
        for inode in &mut medium.inodes {
            if inode.now != inode.safe {
                inode.now = match fate {
                    Fate::Lost => inode.safe.clone(),
                    Fate::Kept => inode.now.clone(),
                    Fate::Drawn(_) => inode.now[..draw(inode.now.len() + 1)].to_vec(),
                };
            }
            inode.safe.clone_from(&inode.now);
        }
        medium.now.clone_from(&names);
        medium.safe = names;
        medium.steps_left = u64::MAX;
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + '_>> {
        let text = path.to_str().unwrap();
        self.bytes(text).map(|bytes| Box::new(io::Cursor::new(bytes)) as _).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn create(&self, path: &Path, _: bool) -> io::Result<Box<dyn NewFile + '_>> {
        self.step()?;
        let mut medium = self.0.borrow_mut();
        assert!(medium.now.contains_key(path.parent().unwrap()), "{} has no folder", path.display());
        let known = medium.now.get(path).copied().flatten();
        let id = known.unwrap_or(medium.inodes.len());
        if known.is_none() {
            medium.inodes.push(Inode::default());
            medium.now.insert(path.to_owned(), Some(id));
        }
        medium.inodes[id].now.clear();
        Ok(Box::new(MemoryFile(self, id)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        let mut medium = self.0.borrow_mut();
        let node = medium.now.remove(from).ok_or(ErrorKind::NotFound)?;
        medium.now.insert(to.to_owned(), node);
        Ok(())
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.0.borrow_mut().now.entry(path.to_owned()).or_insert(None);
        Ok(())
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        // One name after the other: a cut leaves half a tree.
        loop {
            let last = self.0.borrow().now.keys().rfind(|name| name.starts_with(path)).cloned();
            let Some(last) = last else { return Ok(()) };
            self.step()?;
            self.0.borrow_mut().now.remove(&last);
        }
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        let mut medium = self.0.borrow_mut();
        let now = medium.now.clone();
        medium.safe.retain(|name, _| name.parent() != Some(path) || now.contains_key(name));
        medium.safe.extend(now.into_iter().filter(|(name, _)| name.parent() == Some(path)));
        Ok(())
    }

    fn lock(&self, _: &Path) -> io::Result<Option<Box<dyn Any>>> {
        Ok(Some(Box::new(())))
    }
}

impl Write for MemoryFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.step()?;
        self.0.0.borrow_mut().inodes[self.1].now.push(bytes[0]);
        Ok(1)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl NewFile for MemoryFile<'_> {
    fn sync(&mut self) -> io::Result<()> {
        self.0.step()?;
        let inode = &mut self.0.0.borrow_mut().inodes[self.1];
        inode.safe.clone_from(&inode.now);
        Ok(())
    }
}

fn maker() -> PrivateKey {
    PrivateKey::from_seed([7; 32])
}

/// Lays a signed update at `/stick/<version>/`.
fn stick(disk: &MemoryDisk, version: &str) -> PathBuf {
    let folder = tempfile::tempdir().unwrap();
    let inside = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(inside("models/lungs")).unwrap();
    std::fs::write(inside(BINARY), format!("firmware {version}")).unwrap();
    std::fs::write(inside("models/lungs/model.toml"), "name = 'lungs'").unwrap();
    let files = [MANIFEST, SIGNATURE, BINARY, "models/lungs/model.toml"];
    Release::pack(folder.path(), version, "some-target", &["bench".into()], &maker()).unwrap();
    for name in files {
        disk.put(&format!("/stick/{version}/{name}"), &std::fs::read(inside(name)).unwrap());
    }
    format!("/stick/{version}").into()
}

fn slots(disk: &MemoryDisk) -> Slots<MemoryDisk> {
    let key = signature::public_key(&maker().public_hex()).unwrap();
    let mut slots = Slots::on(disk.clone(), "/data/slots".into(), "bench".into(), "some-target".into(), key);
    slots.chunk = 64;
    slots
}

fn factory() -> Version {
    Version::parse("1.0.0").unwrap()
}

fn choose(disk: &MemoryDisk) -> Choice {
    slots(disk).choose(Path::new("/factory"))
}

/// A box whose slot a, 1.1.0, is active.
fn box_with_an_active_slot() -> MemoryDisk {
    let disk = MemoryDisk::new();
    disk.put("/data/other", b"");
    let update = stick(&disk, "1.1.0");
    assert_eq!(choose(&disk).folder, Path::new("/factory"));
    slots(&disk).install(&update, factory(), false).unwrap();
    assert!(choose(&disk).trial);
    assert_eq!(slots(&disk).confirm().unwrap(), Confirmation::Active("1.1.0".into()));
    assert_eq!(choose(&disk).folder, Path::new("/data/slots/a"));
    disk
}

#[test]
fn a_confirmed_update_runs_from_then_on() {
    let disk = box_with_an_active_slot();
    let update = stick(&disk, "1.2.0");
    assert_eq!(slots(&disk).install(&update, factory(), false).unwrap(), Trial { slot: Slot::B, version: "1.2.0".into(), tries: 0 });
    assert_eq!(slots(&disk).confirm().unwrap(), Confirmation::NotStarted("1.2.0".into()));
    let choice = choose(&disk);
    assert_eq!((choice.folder.as_path(), choice.trial, choice.passed_over.len()), (Path::new("/data/slots/b"), true, 0));
    assert_eq!(slots(&disk).confirm().unwrap(), Confirmation::Active("1.2.0".into()));
    assert_eq!(slots(&disk).confirm().unwrap(), Confirmation::Nothing);
    for _ in 0..3 {
        let choice = choose(&disk);
        assert_eq!((choice.slot, choice.version.as_deref(), choice.trial), (Some(Slot::B), Some("1.2.0"), false));
    }
    assert_eq!(slots(&disk).state().previous, Some(Slot::A));
}

#[test]
fn an_update_that_is_not_confirmed_is_tried_once_and_taken_back() {
    let disk = box_with_an_active_slot();
    let update = stick(&disk, "1.2.0");
    slots(&disk).install(&update, factory(), false).unwrap();
    assert_eq!(choose(&disk).slot, Some(Slot::B));
    let busy = slots(&disk).install(&update, factory(), false).unwrap_err();
    assert!(matches!(&busy, UpdateError::Busy(text) if text.contains("1.2.0")), "{busy}");
    for boot in 0..3 {
        let choice = choose(&disk);
        assert_eq!((choice.slot, choice.trial), (Some(Slot::A), false));
        assert_eq!(choice.passed_over.len(), usize::from(boot == 0), "{:?}", choice.passed_over);
    }
    let failed = slots(&disk).state().failed.unwrap();
    assert_eq!((failed.version.as_str(), failed.why.as_str()), ("1.2.0", "it was not confirmed after it was started"));
    let again = slots(&disk).install(&update, factory(), false).unwrap_err().to_string();
    assert!(again.contains("1.2.0 was taken back: it was not confirmed"), "{again}");
    slots(&disk).install(&update, factory(), true).unwrap();
    assert!(choose(&disk).trial, "and it may be tried again when somebody insists");
}

#[test]
fn an_older_version_another_board_and_another_machine_are_refused() {
    let disk = box_with_an_active_slot();
    let older = stick(&disk, "1.0.9");
    let error = slots(&disk).install(&older, factory(), false).unwrap_err().to_string();
    assert!(error.contains("1.0.9 is older than the active 1.1.0"), "{error}");
    let same = stick(&disk, "1.1.0");
    let error = slots(&disk).install(&same, factory(), false).unwrap_err().to_string();
    assert!(error.contains("1.1.0 is the active one already"), "{error}");
    assert_eq!(slots(&disk).install(&older, factory(), true).unwrap().version, "1.0.9");
    let update = stick(&disk, "1.2.0");
    let mut elsewhere = slots(&disk);
    elsewhere.board = "other".into();
    let error = elsewhere.install(&update, factory(), false).unwrap_err().to_string();
    assert!(error.contains("is meant for bench, and this board is other"), "{error}");
    let mut elsewhere = slots(&disk);
    elsewhere.target = "riscv".into();
    let error = elsewhere.install(&update, factory(), false).unwrap_err().to_string();
    assert!(error.contains("is built for some-target, and this machine is riscv"), "{error}");
}

#[test]
fn one_flipped_bit_anywhere_in_an_update_is_refused_and_named() {
    let disk = box_with_an_active_slot();
    let update = stick(&disk, "1.2.0");
    let before = slots(&disk).state();
    for name in [MANIFEST, SIGNATURE, BINARY, "models/lungs/model.toml"] {
        let path = format!("{}/{name}", update.display());
        let whole = disk.bytes(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            disk.put(&path, &flipped);
            let error = slots(&disk).install(&update, factory(), false).expect_err("it must be refused");
            let text = error.to_string();
            assert!(matches!(error, UpdateError::Refused { .. }) && text.contains(name), "bit {bit} of {name}: {text}");
        }
        disk.put(&path, &whole);
    }
    assert_eq!(slots(&disk).state(), before);
    assert_eq!(choose(&disk).slot, Some(Slot::A));
    slots(&disk).install(&update, factory(), false).unwrap();
}

#[test]
fn a_slot_whose_bits_have_rotted_is_passed_over() {
    let disk = box_with_an_active_slot();
    let update = stick(&disk, "1.2.0");
    slots(&disk).install(&update, factory(), false).unwrap();
    choose(&disk);
    slots(&disk).confirm().unwrap();
    disk.put("/data/slots/b/scanside", b"firmware 1.2.1");
    let choice = choose(&disk);
    assert_eq!(choice.slot, Some(Slot::A), "the one before it is still whole");
    assert!(choice.passed_over[0].contains("scanside: its SHA-256 is"), "{:?}", choice.passed_over);
    disk.put("/data/slots/a/models/lungs/model.toml", b"");
    assert_eq!(choose(&disk).folder, Path::new("/factory"));
    disk.put("/data/slots/state.json", b"{\"active\":");
    assert_eq!(choose(&disk).folder, Path::new("/factory"));
}

/// Runs `action` until the power goes after `steps` steps; whether it came to its end.
fn cut_after(disk: &MemoryDisk, steps: u64, fate: Fate, action: impl Fn(&MemoryDisk) -> bool) -> bool {
    disk.0.borrow_mut().steps_left = steps;
    let finished = action(disk);
    disk.power_cut(fate);
    finished
}

/// Cuts `action` after every one of its steps, with every fate, and lets `judge` look at each disk after the restart.
/// Returns how many steps there were.
fn cut_everywhere(start: &MemoryDisk, action: impl Fn(&MemoryDisk) -> bool, judge: impl Fn(&MemoryDisk, bool)) -> u64 {
    for steps in 0.. {
        let mut finished = false;
        for fate in [Fate::Lost, Fate::Kept, Fate::Drawn(steps), Fate::Drawn(!steps)] {
            let disk = start.copy();
            finished = cut_after(&disk, steps, fate, &action);
            judge(&disk, finished);
        }
        if finished {
            return steps;
        }
    }
    unreachable!()
}

#[test]
fn a_power_cut_at_any_byte_of_an_update_leaves_a_whole_firmware() {
    let start = box_with_an_active_slot();
    let update = stick(&start, "1.2.0");
    let steps = cut_everywhere(
        &start,
        |disk| slots(disk).install(&update, factory(), false).is_ok(),
        |disk, finished| {
            let first = choose(disk);
            assert!(first.passed_over.is_empty(), "{:?}", first.passed_over);
            match first.trial {
                // Whole, or `choose` would not have named it; and not confirmed, so that the old one comes back.
                true => assert_eq!(first.version.as_deref(), Some("1.2.0")),
                false => assert!(!finished && first.version.as_deref() == Some("1.1.0"), "{first:?}"),
            }
            let second = choose(disk);
            assert_eq!((second.version.as_deref(), second.trial), (Some("1.1.0"), false));
            slots(disk).install(&update, factory(), true).expect("and the update can be begun again");
        },
    );
    assert!(steps > 400, "{steps}");
}

#[test]
fn a_power_cut_while_an_update_replaces_the_previous_slot_leaves_a_whole_firmware() {
    let start = box_with_an_active_slot();
    let update = stick(&start, "1.2.0");
    slots(&start).install(&update, factory(), false).unwrap();
    choose(&start);
    slots(&start).confirm().unwrap();
    let next = stick(&start, "1.3.0");
    let action = |disk: &MemoryDisk| slots(disk).install(&next, factory(), false).is_ok();
    cut_everywhere(&start, action, |disk, _| {
        let first = choose(disk);
        assert!(first.passed_over.is_empty() && first.version.as_deref() >= Some("1.2.0"), "{first:?}");
        assert_eq!(choose(disk).version.as_deref(), Some("1.2.0"));
    });
}

#[test]
fn a_power_cut_while_booting_never_tries_a_slot_twice() {
    let start = box_with_an_active_slot();
    let update = stick(&start, "1.2.0");
    slots(&start).install(&update, factory(), false).unwrap();
    // `choose` always answers; what counts is whether it had said "trial" when the power went.
    let action = |disk: &MemoryDisk| choose(disk).trial;
    cut_everywhere(&start, action, |disk, tried| {
        let next = choose(disk);
        assert!(!(tried && next.trial), "it was given out a second time");
        assert!(matches!(next.version.as_deref(), Some("1.1.0" | "1.2.0")), "{next:?}");
        assert_eq!(choose(disk).version.as_deref(), Some("1.1.0"));
    });
}

#[test]
fn a_power_cut_while_an_update_is_confirmed_leaves_one_of_the_two() {
    let start = box_with_an_active_slot();
    let update = stick(&start, "1.2.0");
    slots(&start).install(&update, factory(), false).unwrap();
    choose(&start);
    let action = |disk: &MemoryDisk| matches!(slots(disk).confirm(), Ok(Confirmation::Active(_)));
    cut_everywhere(&start, action, |disk, finished| {
        let next = choose(disk);
        let want = if finished { "1.2.0" } else { next.version.as_deref().unwrap() };
        assert!(["1.1.0", "1.2.0"].contains(&want) && !next.trial);
        for _ in 0..2 {
            assert_eq!(choose(disk).version.as_deref(), Some(want));
        }
    });
}
