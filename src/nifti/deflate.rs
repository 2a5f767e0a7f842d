//! gzip out, made for voxels (RFC 1951, RFC 1952): fast where a scan is noise, small where it is air or a mask.
//!
//! The pieces of a file are packed each by itself, on as many threads as there are, and end on a byte: one gzip member
//! that any reader takes, and the same bytes for any number of threads. zlib's fastest level codes noise with fixed
//! Huffman codes, which makes scans a third larger; its next one takes twice the time. Voxels want neither: mostly no
//! string repeats, so that the search for one may give up early, but codes made for each block pay.

use std::io::{self, Write};

use libdeflater::Crc;

use crate::pool::Pool;

/// Bytes of one block of codes. At most 65,535, so that what cannot be packed is one stored block.
const BLOCK_BYTES: usize = 65_520;

/// Bytes packed by one task: long enough that its 32 KiB of unknown past cost nothing.
const PIECE_BYTES: usize = 4 * BLOCK_BYTES;

/// Codes of literals, lengths and distances have at most so many bits (15 are allowed): four of them and seven bits left
/// over fit 64.
const CODE_BITS_MAX: usize = 14;

const END_OF_BLOCK: usize = 256;
const WINDOW_BYTES: usize = 32_768;
const MATCH_MAX: usize = 258;
const HASH_BITS: u32 = 13;

/// A gzip file being written.
pub(super) struct GzipWriter<'p, W: Write> {
    out: W,
    pool: Option<&'p Pool>,
    /// What is not packed yet; at most one piece for each thread.
    pending: Vec<u8>,
    crc: Crc,
    bytes: u64,
}

impl<W: Write> std::fmt::Debug for GzipWriter<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GzipWriter").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl<'p, W: Write> GzipWriter<'p, W> {
    pub fn new(mut out: W, pool: Option<&'p Pool>) -> io::Result<Self> {
        // No name, no time: the same voxels are the same file. 255: made on no system in particular.
        out.write_all(&[0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 4, 255])?;
        Ok(Self { out, pool, pending: Vec::new(), crc: Crc::new(), bytes: 0 })
    }

    fn batch_bytes(&self) -> usize {
        PIECE_BYTES * self.pool.map_or(1, Pool::threads)
    }

    fn pack(&mut self) -> io::Result<()> {
        let pieces: Vec<&[u8]> = self.pending.chunks(PIECE_BYTES).collect();
        match self.pool {
            Some(pool) if pieces.len() > 1 => {
                let packed = pool.map(pieces.len(), |n| pack_piece(pieces[n])).map_err(io::Error::other)?;
                packed.iter().try_for_each(|piece| self.out.write_all(piece))?;
            }
            _ => pieces.iter().try_for_each(|piece| self.out.write_all(&pack_piece(piece)))?,
        }
        self.pending.clear();
        Ok(())
    }

    /// Ends the file.
    pub fn finish(mut self) -> io::Result<W> {
        self.pack()?;
        // A last block with nothing in it, then checksum and length.
        self.out.write_all(&[3, 0])?;
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        self.out.write_all(&(self.bytes as u32).to_le_bytes())?;
        Ok(self.out)
    }
}

impl<W: Write> Write for GzipWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.batch_bytes() - self.pending.len();
        let taken = &bytes[..room.min(bytes.len())];
        self.pending.extend_from_slice(taken);
        self.crc.update(taken);
        self.bytes += taken.len() as u64;
        if self.pending.len() == self.batch_bytes() {
            self.pack()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// So many literals, then a copy of `length` bytes from `distance` back; length 0 at the end of a block.
#[derive(Debug, Clone, Copy)]
struct Step {
    literals: u32,
    length: u16,
    distance: u16,
}

/// Packs a piece to whole bytes of deflate blocks, none of which is the last.
fn pack_piece(piece: &[u8]) -> Vec<u8> {
    let mut bits = Bits { out: Vec::with_capacity(piece.len() / 2 + 64), at: 0, held: 0, count: 0 };
    let mut search = Search { seen: vec![u32::MAX; 1 << HASH_BITS], fruitless: 0 };
    let mut steps = Vec::new();
    for start in (0..piece.len()).step_by(BLOCK_BYTES) {
        let end = (start + BLOCK_BYTES).min(piece.len());
        search.steps(piece, start, end, &mut steps);
        write_block(&piece[start..end], &steps, &mut bits);
    }
    bits.stored(&[]);
    bits.out
}

/// Where strings of four bytes were seen last.
struct Search {
    seen: Vec<u32>,
    /// Places looked at since the last repetition.
    fruitless: u32,
}

impl Search {
    fn steps(&mut self, piece: &[u8], start: usize, end: usize, steps: &mut Vec<Step>) {
        steps.clear();
        let word = |at: usize| u32::from_le_bytes(piece[at..at + 4].try_into().expect("four bytes"));
        let slot = |word: u32| (word.wrapping_mul(0x9E37_79B1) >> (32 - HASH_BITS)) as usize;
        let (mut at, mut from) = (start, start);
        while at + 4 <= end {
            let here = word(at);
            let seen = std::mem::replace(&mut self.seen[slot(here)], at as u32) as usize;
            let distance = at.wrapping_sub(seen);
            if seen >= at || distance > WINDOW_BYTES || word(seen) != here {
                self.fruitless = (self.fruitless + 1).min(FRUITLESS_MAX);
                at += 1 + (self.fruitless >> FRUITLESS_SHIFT) as usize;
                continue;
            }
            let (mut at_start, mut seen_start) = (at, seen);
            while at_start > from && seen_start > 0 && piece[at_start - 1] == piece[seen_start - 1] {
                (at_start, seen_start) = (at_start - 1, seen_start - 1);
            }
            let length = at + 4 - at_start + same(&piece[seen + 4..], &piece[at + 4..end]);
            // In noise four bytes repeat by chance; as a copy they take more bits than their own codes, and more time.
            if length < 8 || (length < 12 && distance > NEAR_BYTES) {
                self.fruitless = (self.fruitless + 1).min(FRUITLESS_MAX);
                at += 1;
                continue;
            }
            self.fruitless = 0;
            let until = at_start + length;
            let mut literals = (at_start - from) as u32;
            let mut left = length;
            while left > 0 {
                // No rest shorter than the shortest copy.
                let length = if left > MATCH_MAX && left < MATCH_MAX + 4 { left - 4 } else { left.min(MATCH_MAX) };
                steps.push(Step { literals, length: length as u16, distance: distance as u16 });
                (literals, left) = (0, left - length);
            }
            if until + 4 <= end {
                self.seen[slot(word(until - 2))] = (until - 2) as u32;
            }
            (at, from) = (until, until);
        }
        steps.push(Step { literals: (end - from) as u32, length: 0, distance: 0 });
    }
}

/// After so many fruitless looks (two to this power) every second place is looked at, then every third, …
const FRUITLESS_SHIFT: u32 = 5;

/// … up to every 32nd: a mask after noise is still found within a row.
const FRUITLESS_MAX: u32 = 31 << FRUITLESS_SHIFT;

/// Copies of less than twelve bytes come from at most this far.
const NEAR_BYTES: usize = 512;

/// How many bytes at the start of both are the same.
fn same(a: &[u8], b: &[u8]) -> usize {
    let words = a.chunks_exact(8).zip(b.chunks_exact(8));
    let mut n = 0;
    for (x, y) in words {
        let [x, y] = [x, y].map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
        if x != y {
            return n + ((x ^ y).trailing_zeros() / 8) as usize;
        }
        n += 8;
    }
    n + a[n..].iter().zip(&b[n..]).take_while(|(x, y)| x == y).count()
}

/// Base, extra bits of each length code (RFC 1951, 3.2.5), from symbol 257 on.
const LENGTHS: [(u16, u8); 29] = {
    let mut codes = [(0, 0); 29];
    let (mut base, mut n) = (3, 0);
    while n < 28 {
        let extra = if n < 8 { 0 } else { n as u8 / 4 - 1 };
        codes[n] = (base, extra);
        base += 1 << extra;
        n += 1;
    }
    codes[28] = (258, 0);
    codes
};

/// Base and extra bits of each distance code.
const DISTANCES: [(u16, u8); 30] = {
    let mut codes = [(0, 0); 30];
    let (mut base, mut n) = (1, 0);
    while n < 30 {
        let extra = if n < 4 { 0 } else { n as u8 / 2 - 1 };
        codes[n] = (base, extra);
        base += 1 << extra;
        n += 1;
    }
    codes
};

/// Of each length from 0 to 258, its code.
const LENGTH_CODES: [u8; MATCH_MAX + 1] = {
    let mut of = [0; MATCH_MAX + 1];
    let mut length = 3;
    while length <= MATCH_MAX {
        let mut code = 28;
        while LENGTHS[code].0 as usize > length {
            code -= 1;
        }
        of[length] = code as u8;
        length += 1;
    }
    of
};

fn distance_code(distance: u16) -> usize {
    let d = u32::from(distance) - 1;
    if d < 4 {
        return d as usize;
    }
    // Two codes for each power of two.
    let power = 31 - d.leading_zeros();
    (2 * power + ((d >> (power - 1)) & 1)) as usize
}

/// Writes a block by codes made for it, or as it is where they would not pay.
fn write_block(block: &[u8], steps: &[Step], bits: &mut Bits) {
    let (literals, distances) = frequencies(block, steps);
    let [mut literal_lengths, mut distance_lengths] = [[0u8; 286], [0u8; 286]];
    code_lengths(&literals, CODE_BITS_MAX, &mut literal_lengths);
    code_lengths(&distances, CODE_BITS_MAX, &mut distance_lengths[..30]);
    let head = Head::of(&literal_lengths, &distance_lengths[..30]);
    let sum = |counts: &[u32], lengths: &[u8]| -> u64 { counts.iter().zip(lengths).map(|(n, l)| u64::from(*n) * u64::from(*l)).sum() };
    let extra = |counts: &[u32], codes: &[(u16, u8)]| -> u64 { counts.iter().zip(codes).map(|(n, c)| u64::from(*n) * u64::from(c.1)).sum() };
    let cost = head.bits()
        + sum(&literals, &literal_lengths)
        + sum(&distances, &distance_lengths)
        + extra(&literals[257..], &LENGTHS)
        + extra(&distances, &DISTANCES);
    if cost >= 8 * block.len() as u64 {
        return bits.stored(block);
    }
    bits.reserve(cost as usize / 8 + 16);
    head.write(bits);
    let literal_codes = codes(&literal_lengths);
    let distance_codes = codes(&distance_lengths[..30]);
    let mut at = 0;
    for step in steps {
        let run = &block[at..at + step.literals as usize];
        let quads = run.chunks_exact(4);
        let rest = quads.remainder();
        for quad in quads {
            for byte in quad {
                bits.hold(literal_codes[usize::from(*byte)]);
            }
            bits.let_go();
        }
        for byte in rest {
            bits.hold(literal_codes[usize::from(*byte)]);
        }
        bits.let_go();
        at += run.len();
        if step.length == 0 {
            break;
        }
        let length_code = usize::from(LENGTH_CODES[usize::from(step.length)]);
        let (base, extra) = LENGTHS[length_code];
        bits.hold(literal_codes[257 + length_code]);
        bits.hold(Code { bits: step.length - base, count: extra });
        let distance_code = distance_code(step.distance);
        let (base, extra) = DISTANCES[distance_code];
        bits.hold(distance_codes[distance_code]);
        bits.hold(Code { bits: step.distance - base, count: extra });
        bits.let_go();
        at += usize::from(step.length);
    }
    bits.hold(literal_codes[END_OF_BLOCK]);
    bits.let_go();
}

fn frequencies(block: &[u8], steps: &[Step]) -> ([u32; 286], [u32; 30]) {
    // Four counts by turns: the same byte twice does not wait for itself.
    let mut counts = [[0u32; 256]; 4];
    let (mut literals, mut distances) = ([0u32; 286], [0u32; 30]);
    let mut at = 0;
    for step in steps {
        let run = &block[at..at + step.literals as usize];
        let quads = run.chunks_exact(4);
        quads.remainder().iter().for_each(|b| counts[0][usize::from(*b)] += 1);
        for quad in quads {
            for (count, byte) in counts.iter_mut().zip(quad) {
                count[usize::from(*byte)] += 1;
            }
        }
        at += run.len() + usize::from(step.length);
        if step.length > 0 {
            literals[257 + usize::from(LENGTH_CODES[usize::from(step.length)])] += 1;
            distances[distance_code(step.distance)] += 1;
        }
    }
    for (n, count) in literals[..256].iter_mut().enumerate() {
        *count = counts.iter().map(|c| c[n]).sum();
    }
    literals[END_OF_BLOCK] = 1;
    (literals, distances)
}

/// Huffman's code lengths, none above `most` bits; at least two symbols get one, since some readers refuse less.
fn code_lengths(counts: &[u32], most: usize, lengths: &mut [u8]) {
    lengths.fill(0);
    let mut leaves: Vec<(u32, u16)> = Vec::with_capacity(counts.len());
    leaves.extend(counts.iter().zip(0u16..).filter(|(count, _)| **count > 0).map(|(count, symbol)| (*count, symbol)));
    for symbol in 0..2 {
        if leaves.len() < 2 && leaves.iter().all(|(_, s)| *s != symbol) {
            leaves.push((1, symbol));
        }
    }
    leaves.sort_unstable();
    // Leaves and inner nodes each in order of their weight: the two lightest are always at one of the two fronts.
    let n = leaves.len();
    let mut weights: Vec<u64> = leaves.iter().map(|(count, _)| u64::from(*count)).collect();
    let mut parents = vec![0usize; 2 * n - 1];
    let (mut leaf, mut inner) = (0, n);
    for node in n..2 * n - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            let lightest = if leaf < n && (inner >= node || weights[leaf] <= weights[inner]) { &mut leaf } else { &mut inner };
            weight += weights[*lightest];
            parents[*lightest] = node;
            *lightest += 1;
        }
        weights.push(weight);
    }
    let mut depths = vec![0usize; 2 * n - 1];
    let mut of_length = [0usize; 16];
    for node in (0..2 * n - 2).rev() {
        depths[node] = depths[parents[node]] + 1;
        if node < n {
            of_length[depths[node].min(most)] += 1;
        }
    }
    // Cut codes take more room than there is: lengthen others until it fits.
    let room = 1usize << most;
    let mut taken: usize = (1..=most).map(|l| of_length[l] << (most - l)).sum();
    while taken > room {
        let shorter = (1..most).rev().find(|l| of_length[*l] > 0).expect("there is a code to lengthen");
        of_length[shorter] -= 1;
        of_length[shorter + 1] += 2;
        of_length[most] -= 1;
        taken -= 1;
    }
    let mut rarest_first = leaves.iter();
    for length in (1..=most).rev() {
        for (_, symbol) in rarest_first.by_ref().take(of_length[length]) {
            lengths[usize::from(*symbol)] = length as u8;
        }
    }
}

/// Bits to write, the first of them lowest.
#[derive(Debug, Clone, Copy, Default)]
struct Code {
    bits: u16,
    count: u8,
}

/// The codes that follow from their lengths (RFC 1951, 3.2.2).
fn codes(lengths: &[u8]) -> [Code; 286] {
    let mut next = [0u16; 16];
    let mut codes = [Code::default(); 286];
    let mut code = 0;
    for length in 1..=15u8 {
        next[usize::from(length)] = code;
        code = (code + lengths.iter().filter(|l| **l == length).count() as u16) << 1;
    }
    for (entry, length) in codes.iter_mut().zip(lengths).filter(|(_, length)| **length > 0) {
        let code = &mut next[usize::from(*length)];
        *entry = Code { bits: code.reverse_bits() >> (16 - length), count: *length };
        *code += 1;
    }
    codes
}

/// The head of a block: the lengths of its codes, themselves coded.
struct Head {
    literals: usize,
    distances: usize,
    /// Symbol, and the extra bits that 16, 17 and 18 take.
    runs: Vec<(u8, u16)>,
    lengths: [u8; 19],
    sent: usize,
}

/// The order in which the lengths of these codes are sent.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

fn run_bits(symbol: u8) -> u8 {
    [2, 3, 7].get(usize::from(symbol).wrapping_sub(16)).copied().unwrap_or(0)
}

impl Head {
    fn of(literal: &[u8], distance: &[u8]) -> Self {
        let used = |lengths: &[u8], least: usize| lengths.iter().rposition(|l| *l > 0).map_or(least, |n| (n + 1).max(least));
        let (literals, distances) = (used(literal, 257), used(distance, 1));
        let all = [&literal[..literals], &distance[..distances]].concat();
        let mut runs = Vec::new();
        let mut rest = &all[..];
        while let Some(first) = rest.first() {
            let alike = rest.iter().take_while(|l| *l == first).count();
            let (run, taken) = match (first, alike) {
                (0, 11..) => ((18, alike.min(138) as u16 - 11), alike.min(138)),
                (0, 3..) => ((17, alike as u16 - 3), alike),
                // The length itself, then how often it is repeated.
                (_, 4..) => {
                    runs.push((*first, 0));
                    ((16, (alike - 1).min(6) as u16 - 3), (alike - 1).min(6) + 1)
                }
                _ => ((*first, 0), 1),
            };
            runs.push(run);
            rest = &rest[taken..];
        }
        let mut counts = [0u32; 19];
        runs.iter().for_each(|(symbol, _)| counts[usize::from(*symbol)] += 1);
        let mut lengths = [0; 19];
        code_lengths(&counts, 7, &mut lengths);
        let sent = ORDER.iter().rposition(|n| lengths[*n] > 0).map_or(4, |n| (n + 1).max(4));
        Self { literals, distances, runs, lengths, sent }
    }

    fn bits(&self) -> u64 {
        let run = |(symbol, _): &(u8, u16)| u64::from(self.lengths[usize::from(*symbol)] + run_bits(*symbol));
        17 + 3 * self.sent as u64 + self.runs.iter().map(run).sum::<u64>()
    }

    fn write(&self, bits: &mut Bits) {
        let mut put = |value: usize, count: u8| {
            bits.hold(Code { bits: value as u16, count });
            bits.let_go();
        };
        // Not the last block; codes of its own.
        put(0b100, 3);
        put(self.literals - 257, 5);
        put(self.distances - 1, 5);
        put(self.sent - 4, 4);
        ORDER[..self.sent].iter().for_each(|n| put(usize::from(self.lengths[*n]), 3));
        let codes = codes(&self.lengths);
        for (symbol, extra) in &self.runs {
            let code = codes[usize::from(*symbol)];
            put(usize::from(code.bits), code.count);
            put(usize::from(*extra), run_bits(*symbol));
        }
    }
}

/// Bytes out, bit by bit from the lowest.
struct Bits {
    /// Its end is room that was reserved.
    out: Vec<u8>,
    at: usize,
    held: u64,
    count: u32,
}

impl Bits {
    /// Makes room for so many bytes more, which `let_go` needs eight of.
    fn reserve(&mut self, bytes: usize) {
        self.out.resize(self.at + bytes + 8, 0);
    }

    /// Up to 56 bits are held.
    fn hold(&mut self, code: Code) {
        self.held |= u64::from(code.bits) << self.count;
        self.count += u32::from(code.count);
    }

    /// Writes the whole bytes of what is held.
    fn let_go(&mut self) {
        self.out[self.at..self.at + 8].copy_from_slice(&self.held.to_le_bytes());
        self.at += (self.count / 8) as usize;
        self.held >>= self.count & !7;
        self.count &= 7;
    }

    /// Bytes as they are, at most 65,535; ends on a whole byte.
    fn stored(&mut self, bytes: &[u8]) {
        self.reserve(16);
        self.hold(Code { bits: 0, count: 3 });
        self.count = self.count.next_multiple_of(8);
        self.let_go();
        self.out.truncate(self.at);
        let length = bytes.len() as u16;
        self.out.extend(length.to_le_bytes().into_iter().chain((!length).to_le_bytes()));
        self.out.extend_from_slice(bytes);
        self.at = self.out.len();
    }
}

#[cfg(test)]
mod tests;
