//! JPEG of 12 bits: the extended sequential process of one grey component (ITU-T T.81, F.2), which old CT and MR scanners
//! wrote and the usual decoders leave out.

/// Blocks are 8 x 8 coefficients.
const SIDE: usize = 8;

/// Order in which coefficients are written: T.81 figure A.6, as row * 8 + column.
const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35,
    42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Precision and components of a sequential JPEG (SOF0, SOF1), or None for another process.
pub(super) fn sequential_precision(jpeg: &[u8]) -> Option<(u8, u8)> {
    let frame = |marker: &u8| (0xC0..=0xCF).contains(marker) && ![0xC4, 0xC8, 0xCC].contains(marker);
    match segments(jpeg).find(|(marker, ..)| frame(marker))? {
        (0xC0 | 0xC1, [precision, _, _, _, _, components, ..], _) => Some((*precision, *components)),
        _ => None,
    }
}

/// Marker segments with their bodies and what follows, up to the start of scan; that one is the last.
fn segments(jpeg: &[u8]) -> impl Iterator<Item = (u8, &[u8], &[u8])> {
    let mut at = 2;
    let mut over = !jpeg.starts_with(&[0xFF, 0xD8]);
    std::iter::from_fn(move || {
        if over {
            return None;
        }
        // Fill bytes before a marker are allowed (T.81 B.1.1.2).
        while jpeg.get(at..at + 2) == Some(&[0xFF, 0xFF]) {
            at += 1;
        }
        let [0xFF, marker, high, low] = *jpeg.get(at..)?.first_chunk::<4>()? else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let body = jpeg.get(at + 4..at + 2 + length)?;
        at += 2 + length;
        over = marker == 0xDA;
        Some((marker, body, &jpeg[at..]))
    })
}

/// A Huffman table (T.81 annex C), as the ends of the codes of each length.
#[derive(Default, Clone)]
struct Huffman {
    /// For each length, one above its last code, shifted to 16 bits; and what to add to a code to find its value.
    ends: [(u32, i32); 17],
    values: Vec<u8>,
}

impl Huffman {
    fn new(counts: &[u8; 16], values: &[u8]) -> Option<Self> {
        let mut table = Self { ends: [(0, 0); 17], values: values.to_vec() };
        let (mut code, mut first) = (0u32, 0i32);
        for length in 1..=16 {
            let count = u32::from(counts[length - 1]);
            let offset = first - code as i32;
            code += count;
            first += count as i32;
            if code > 1 << length {
                return None;
            }
            table.ends[length] = (code << (16 - length), offset);
            code <<= 1;
        }
        Some(table)
    }
}

/// Bits of the entropy-coded data; zeros once a marker or the end is reached.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    window: u64,
    held: u32,
    /// Bits asked for beyond the data.
    missing: u32,
}

impl Bits<'_> {
    fn fill(&mut self) {
        while self.held <= 48 {
            let byte = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => {
                    self.at += 2;
                    0xFF
                }
                (Some(0xFF), _) | (None, _) => {
                    self.missing += 8;
                    0
                }
                (Some(byte), _) => {
                    self.at += 1;
                    *byte
                }
            };
            self.window |= u64::from(byte) << (56 - self.held);
            self.held += 8;
        }
    }

    fn take(&mut self, n: u32) -> u32 {
        if n == 0 {
            return 0;
        }
        if self.held < n {
            self.fill();
        }
        let value = (self.window >> (64 - n)) as u32;
        self.window <<= n;
        self.held -= n;
        value
    }

    fn symbol(&mut self, table: &Huffman) -> Option<u8> {
        if self.held < 16 {
            self.fill();
        }
        let peek = (self.window >> 48) as u32;
        let length = (1..=16).find(|length| peek < table.ends[*length].0)?;
        let code = self.take(length as u32) as i32;
        table.values.get(usize::try_from(code + table.ends[length].1).ok()?).copied()
    }

    /// T.81 F.2.2.1: a value of `n` bits, negative ones one below their mirror.
    fn signed(&mut self, n: u32) -> i32 {
        let v = self.take(n) as i32;
        if n > 0 && v < 1 << (n - 1) { v - (1 << n) + 1 } else { v }
    }

    /// Goes behind the next restart marker.
    fn restart(&mut self) -> Option<()> {
        // Bytes in the window are beyond the last block only if they are padding: the marker stops `fill`.
        (self.window, self.held, self.missing) = (0, 0, 0);
        while !matches!(self.bytes.get(self.at..self.at + 2)?, [0xFF, 0xD0..=0xD7]) {
            self.at += 1;
        }
        self.at += 2;
        Some(())
    }
}

/// Decodes one grey image of 12 (or 8) bits to values row by row. The caller has capped `rows` and `columns`.
pub(super) fn decode(jpeg: &[u8], rows: usize, columns: usize) -> Result<Vec<u16>, &'static str> {
    let mut quantization: [Option<[f32; 64]>; 4] = [None; 4];
    let mut huffman: [[Option<Huffman>; 4]; 2] = Default::default();
    let mut frame: Option<(u8, usize)> = None;
    let mut restart_every = 0;
    for (marker, body, rest) in segments(jpeg) {
        match (marker, body) {
            (0xDB, _) => read_quantization(body, &mut quantization).ok_or("a quantization table is cut")?,
            (0xC4, _) => read_huffman(body, &mut huffman).ok_or("a Huffman table is cut or impossible")?,
            (0xDD, [high, low, ..]) => restart_every = usize::from(u16::from_be_bytes([*high, *low])),
            (0xC0 | 0xC1, [precision @ (8 | 12), r1, r0, c1, c0, 1, _, _, table, ..]) => {
                let size = [u16::from_be_bytes([*r1, *r0]), u16::from_be_bytes([*c1, *c0])].map(usize::from);
                if size != [rows, columns] {
                    return Err("its size is not that of the header");
                }
                frame = Some((*precision, usize::from(*table) & 3));
            }
            (0xC0 | 0xC1, _) => return Err("a frame that is not one component of 8 or 12 bits"),
            (0xDA, [1, _, tables, ..]) => {
                let (precision, table) = frame.ok_or("a scan before its frame")?;
                let table = quantization[table].ok_or("no quantization table")?;
                let dc = huffman[0][usize::from(tables >> 4) & 3].as_ref().ok_or("no Huffman table")?;
                let ac = huffman[1][usize::from(tables & 15) & 3].as_ref().ok_or("no Huffman table")?;
                return scan(rest, [rows, columns], precision, &table, dc, ac, restart_every);
            }
            _ => {}
        }
    }
    Err("no scan of one component")
}

fn read_quantization(mut body: &[u8], tables: &mut [Option<[f32; 64]>; 4]) -> Option<()> {
    while let Some((head, rest)) = body.split_first() {
        let width = if head >> 4 == 0 { 1 } else { 2 };
        let (entries, rest) = rest.split_at_checked(64 * width)?;
        let mut table = [0.0; 64];
        for (n, entry) in entries.chunks_exact(width).enumerate() {
            table[ZIGZAG[n]] = entry.iter().fold(0, |v, b| v << 8 | u32::from(*b)) as f32;
        }
        tables[usize::from(head & 3)] = Some(table);
        body = rest;
    }
    Some(())
}

fn read_huffman(mut body: &[u8], tables: &mut [[Option<Huffman>; 4]; 2]) -> Option<()> {
    while let Some((head, rest)) = body.split_first() {
        let (counts, rest) = rest.split_first_chunk::<16>()?;
        let (values, rest) = rest.split_at_checked(counts.iter().map(|n| usize::from(*n)).sum())?;
        tables[usize::from(head >> 4 & 1)][usize::from(head & 3)] = Some(Huffman::new(counts, values)?);
        body = rest;
    }
    Some(())
}

fn scan(
    data: &[u8],
    [rows, columns]: [usize; 2],
    precision: u8,
    quantization: &[f32; 64],
    dc: &Huffman,
    ac: &Huffman,
    restart_every: usize,
) -> Result<Vec<u16>, &'static str> {
    let cosines = cosines();
    let (middle, top) = ((1i32 << (precision - 1)) as f32, ((1i32 << precision) - 1) as f32);
    let mut bits = Bits { bytes: data, at: 0, window: 0, held: 0, missing: 0 };
    let mut out = vec![0; rows * columns];
    let mut last_dc = 0i32;
    let across = columns.div_ceil(SIDE);
    for block in 0..across * rows.div_ceil(SIDE) {
        if restart_every > 0 && block > 0 && block % restart_every == 0 {
            bits.restart().ok_or("a restart marker is missing")?;
            last_dc = 0;
        }
        let mut coefficients = [0.0f32; 64];
        let size = bits.symbol(dc).filter(|size| *size <= 16).ok_or("a broken code")?;
        last_dc = last_dc.wrapping_add(bits.signed(size.into()));
        coefficients[0] = last_dc as f32 * quantization[0];
        let mut n = 1;
        while n < 64 {
            let symbol = bits.symbol(ac).ok_or("a broken code")?;
            let (run, size) = (usize::from(symbol >> 4), symbol & 15);
            if size == 0 {
                if run < 15 {
                    break;
                }
                n += 16;
                continue;
            }
            n += run;
            let place = *ZIGZAG.get(n).ok_or("more than 64 coefficients")?;
            coefficients[place] = bits.signed(size.into()) as f32 * quantization[place];
            n += 1;
        }
        // Whatever is still held of the padding was never used.
        if bits.missing > bits.held {
            return Err("the scan ends early");
        }
        let values = inverse_cosine(&coefficients, &cosines);
        let (top_row, left) = (block / across * SIDE, block % across * SIDE);
        for (y, line) in values.chunks_exact(SIDE).enumerate().take(rows - top_row) {
            let start = (top_row + y) * columns + left;
            for (o, v) in out[start..start + SIDE.min(columns - left)].iter_mut().zip(line) {
                *o = (v + middle).round().clamp(0.0, top) as u16;
            }
        }
    }
    Ok(out)
}

/// `cos((2x + 1) u pi / 16)` with T.81's scale, at `[u][x]`.
fn cosines() -> [[f32; SIDE]; SIDE] {
    std::array::from_fn(|u| {
        let scale = if u == 0 { 0.5f64.sqrt() } else { 1.0 } / 2.0;
        std::array::from_fn(|x| {
            let angle = (2 * x + 1) as f64 * u as f64 * std::f64::consts::PI / 16.0;
            (scale * angle.cos()) as f32
        })
    })
}

/// T.81 A.3.3, rows then columns.
fn inverse_cosine(coefficients: &[f32; 64], cosines: &[[f32; SIDE]; SIDE]) -> [f32; 64] {
    let mut lines = [0.0f32; 64];
    for v in 0..SIDE {
        for u in 0..SIDE {
            let c = coefficients[v * SIDE + u];
            if c != 0.0 {
                (0..SIDE).for_each(|x| lines[v * SIDE + x] += c * cosines[u][x]);
            }
        }
    }
    let mut out = [0.0f32; 64];
    for v in 0..SIDE {
        for y in 0..SIDE {
            (0..SIDE).for_each(|x| out[y * SIDE + x] += lines[v * SIDE + x] * cosines[v][y]);
        }
    }
    out
}
