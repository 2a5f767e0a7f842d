//! Pixels of one frame: fragments or plain bytes to stored values, one per pixel, little endian (PS3.5 chapter 8).

use std::borrow::Cow;
use std::ops::Range;

use super::header::PixelFormat;
use super::instance::{Instance, PixelSource, malformed, native_bytes, unsupported};
use super::jpeg12;
use super::transfer::Codec;
use crate::study::Rejection;
use crate::volume::VoxelType;

impl Instance<'_> {
    /// Stored values of frame `n` (from 0), rows of columns, little endian, of `header.pixel.voxel_type()`.
    ///
    /// Bits above Bits Stored are removed (the sign extended). Colour becomes luminance by ITU-R BT.601, of the same
    /// width. Uncompressed pixels that need none of this are not copied: `scratch` is used only where it must be.
    ///
    /// # Errors
    /// A [`Rejection`] `Malformed` when the compressed bytes do not decode to the announced frame or
    /// a value is infinite or NaN, `Unsupported` for a
    /// variant of a codec that is not read here.
    ///
    /// # Panics
    /// When there is no frame `n`.
    pub fn decode_frame<'s>(&'s self, n: usize, scratch: &'s mut Vec<u8>) -> Result<&'s [u8], Rejection> {
        let pixel = &self.header.pixel;
        let palette = pixel.photometric == "PALETTE COLOR";
        if pixel.samples == 3 && pixel.bits_allocated == 16 {
            return self.luminance_of_words(n, scratch);
        }
        if pixel.samples == 3 || palette {
            let rgb = self.decode_frame_rgb(n)?;
            scratch.clear();
            scratch.extend(rgb.chunks_exact(3).map(|c| luminance([c[0].into(), c[1].into(), c[2].into()]) as u8));
            widen(scratch, pixel.voxel_type());
            return Ok(scratch);
        }
        if matches!(self.source, PixelSource::Fragments(_)) {
            *scratch = Vec::new();
        }
        match self.samples(n)? {
            samples if !all_finite(&samples, pixel) => Err(malformed(format!("frame {n} has values that are no finite numbers"))),
            Cow::Borrowed(bytes) if !needs_masking(bytes, pixel) => Ok(bytes),
            Cow::Borrowed(bytes) => {
                scratch.clear();
                scratch.extend_from_slice(bytes);
                mask(scratch, pixel);
                Ok(scratch)
            }
            // Moved, not copied: the memory plan has room for one decoded frame.
            Cow::Owned(samples) => {
                *scratch = samples;
                mask(scratch, pixel);
                Ok(scratch)
            }
        }
    }

    /// Colour of 16 bits per sample, in full width.
    fn luminance_of_words<'s>(&self, n: usize, scratch: &'s mut Vec<u8>) -> Result<&'s [u8], Rejection> {
        if self.header.pixel.photometric != "RGB" || self.header.pixel.signed {
            return Err(unsupported("colour of 16 bits that is not unsigned RGB"));
        }
        let mut samples = self.samples(n)?.into_owned();
        mask(&mut samples, &self.header.pixel);
        let word = |b: &[u8], at: usize| u32::from(u16::from_le_bytes([b[at], b[at + 1]]));
        scratch.clear();
        let grey = |b: &[u8]| luminance([word(b, 0), word(b, 2), word(b, 4)]) as u16;
        scratch.extend(samples.chunks_exact(6).flat_map(|b| grey(b).to_le_bytes()));
        Ok(scratch)
    }

    /// Frame `n` of a colour image as red, green, blue bytes; a grey one as three times its highest eight stored bits.
    ///
    /// # Errors
    /// As [`Instance::decode_frame`].
    ///
    /// # Panics
    /// When there is no frame `n`.
    pub fn decode_frame_rgb(&self, n: usize) -> Result<Vec<u8>, Rejection> {
        let pixel = &self.header.pixel;
        if pixel.float || pixel.bits_allocated > 16 {
            return Err(unsupported(format!("colour of {} bits per sample", pixel.bits_allocated)));
        }
        let samples = self.samples(n)?;
        if pixel.photometric == "PALETTE COLOR" {
            return self.palette_colours(&samples);
        }
        let mut samples = samples.into_owned();
        mask(&mut samples, pixel);
        if pixel.bits_allocated == 16 {
            let shift = u32::from(pixel.bits_stored.max(8) - 8);
            let offset = if pixel.signed { 1u32 << (pixel.bits_stored - 1) } else { 0 };
            samples = samples
                .chunks_exact(2)
                .map(|b| (u32::from(u16::from_le_bytes([b[0], b[1]]).wrapping_add(offset as u16)) >> shift).min(255) as u8)
                .collect();
        }
        if pixel.samples == 1 {
            return Ok(samples.iter().flat_map(|v| [*v; 3]).collect());
        }
        Ok(match self.colour_layout() {
            Layout::Interleaved => samples,
            Layout::Ybr => {
                for c in samples.chunks_exact_mut(3) {
                    c.copy_from_slice(&rgb_of_ybr([c[0], c[1], c[2]]));
                }
                samples
            }
            Layout::Ybr422 => samples
                .chunks_exact(4)
                .flat_map(|c| [rgb_of_ybr([c[0], c[2], c[3]]), rgb_of_ybr([c[1], c[2], c[3]])])
                .flatten()
                .collect(),
        })
    }

    /// Raw samples of a frame: little endian, interleaved, of Bits Allocated (1-bit ones as bytes).
    fn samples(&self, n: usize) -> Result<Cow<'_, [u8]>, Rejection> {
        assert!(n < self.header.frames.len(), "frame {n} of {}", self.header.frames.len());
        let frame = match &self.source {
            PixelSource::Native { at, words } => return Ok(self.native(n, at, *words)),
            PixelSource::Fragments(frames) => frames[n].as_slice(),
        };
        let packed: Cow<'_, [u8]> = match frame {
            [one] => Cow::Borrowed(&self.bytes[one.clone()]),
            many => Cow::Owned(many.iter().flat_map(|range| &self.bytes[range.clone()]).copied().collect()),
        };
        let codec = self.header.transfer_syntax.codec;
        // The codecs are other people's, and read what strangers sent. A panic there is the data's doing, not a fault.
        let decoded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match codec {
            Codec::Native => Ok(packed.into_owned()),
            Codec::Rle => self.rle(&packed),
            Codec::Jpeg => self.jpeg(&packed),
            Codec::JpegLs => self.jpeg_ls(&packed),
            Codec::Jpeg2000 => self.jpeg_2000(&packed),
        }))
        .unwrap_or_else(|_| Err(malformed("the decoder gave up on the compressed pixels")))?;
        let want = self.decoded_bytes();
        if decoded.len() < want {
            return Err(malformed(format!("frame {n} decodes to {} bytes instead of {want}", decoded.len())));
        }
        let mut decoded = decoded;
        decoded.truncate(want);
        Ok(Cow::Owned(decoded))
    }

    /// Bytes of one decoded frame, all its samples.
    pub fn decoded_bytes(&self) -> usize {
        let p = &self.header.pixel;
        self.header.rows * self.header.columns * p.samples * usize::from(p.bits_allocated / 8).max(1)
    }

    fn native(&self, n: usize, at: &Range<usize>, words: bool) -> Cow<'_, [u8]> {
        let pixel = &self.header.pixel;
        let bits = native_bytes(&self.header).expect("checked when the pixels were located");
        if pixel.bits_allocated == 1 {
            let all = &self.bytes[at.clone()];
            return (n * bits..(n + 1) * bits).map(|b| (all[b / 8] >> (b % 8)) & 1).collect();
        }
        let frame = bits / 8;
        let start = at.start + n * frame;
        let big = self.header.transfer_syntax.encoding.big_endian;
        // Bytes in 16-bit words of a big-endian file stand in pairs, second first (PS3.5 8.1.1).
        if big && words && pixel.bits_allocated == 8 {
            let swapped = |i: usize| at.start + ((i - at.start) ^ 1);
            return (start..start + frame).map(|i| self.bytes.get(swapped(i)).copied().unwrap_or(0)).collect();
        }
        let bytes = &self.bytes[start..start + frame];
        let width = usize::from(pixel.bits_allocated / 8);
        let mut out = Cow::Borrowed(bytes);
        if big && width > 1 {
            out.to_mut().chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        if pixel.planar { Cow::Owned(interleave(&out, pixel)) } else { out }
    }

    fn rle(&self, packed: &[u8]) -> Result<Vec<u8>, Rejection> {
        let pixel = &self.header.pixel;
        let width = usize::from(pixel.bits_allocated / 8).max(1);
        let pixels = self.header.rows * self.header.columns;
        let word = |n: usize| packed.get(n * 4..n * 4 + 4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes")) as usize);
        let segments = word(0).ok_or_else(|| malformed("the RLE header is cut"))?;
        if segments != width * pixel.samples {
            return Err(malformed(format!("{segments} RLE segments for {} samples of {width} bytes", pixel.samples)));
        }
        let mut out = vec![0; self.decoded_bytes()];
        for segment in 0..segments {
            let start = word(segment + 1).ok_or_else(|| malformed("the RLE header is cut"))?;
            let end = if segment + 1 < segments { word(segment + 2).unwrap_or(0) } else { packed.len() };
            let run = packed.get(start..end.min(packed.len())).ok_or_else(|| malformed("an RLE offset is outside"))?;
            // Segments hold the highest byte of the first sample, its lower ones, then the next sample's.
            let (sample, byte) = (segment / width, width - 1 - segment % width);
            let places = (0..pixels).map(|p| (p * pixel.samples + sample) * width + byte);
            if !unpack_bits(run, places, &mut out) {
                return Err(malformed(format!("RLE segment {segment} ends early")));
            }
        }
        Ok(out)
    }

    fn jpeg(&self, packed: &[u8]) -> Result<Vec<u8>, Rejection> {
        let pixel = &self.header.pixel;
        let wrong = |what: String| malformed(format!("JPEG: {what}"));
        if jpeg12::sequential_precision(packed) == Some((12, 1)) && pixel.bits_allocated == 16 && pixel.samples == 1 {
            let values = jpeg12::decode(packed, self.header.rows, self.header.columns).map_err(|what| wrong(what.into()))?;
            return Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
        let mut decoder = jpeg_decoder::Decoder::new(packed);
        decoder.set_max_decoding_buffer_size(self.decoded_bytes().max(1 << 16) * 2);
        if let Some(transform) = colour_transform(packed, &pixel.photometric).filter(|_| pixel.samples == 3) {
            decoder.set_color_transform(transform);
        }
        let as_rejection = |error: jpeg_decoder::Error| match error {
            jpeg_decoder::Error::Unsupported(feature) => unsupported(format!("JPEG: {feature:?}")),
            other => wrong(other.to_string()),
        };
        decoder.read_info().map_err(as_rejection)?;
        let info = decoder.info().ok_or_else(|| wrong("no frame header".into()))?;
        let (rows, columns) = (usize::from(info.height), usize::from(info.width));
        if (rows, columns) != (self.header.rows, self.header.columns) {
            return Err(wrong(format!("{rows} x {columns} pixels, the header says {} x {}", self.header.rows, self.header.columns)));
        }
        let (samples, bytes) = match info.pixel_format {
            jpeg_decoder::PixelFormat::L8 => (1, 1),
            jpeg_decoder::PixelFormat::L16 => (1, 2),
            jpeg_decoder::PixelFormat::RGB24 => (3, 1),
            jpeg_decoder::PixelFormat::CMYK32 => return Err(unsupported("JPEG: four components")),
        };
        if samples != pixel.samples {
            return Err(wrong(format!("{samples} components, the header says {}", pixel.samples)));
        }
        let decoded = decoder.decode().map_err(as_rejection)?;
        Ok(match (bytes, pixel.bits_allocated) {
            (1, 8) | (2, 16) => decoded,
            (1, 16) => decoded.iter().flat_map(|v| [*v, 0]).collect(),
            _ => return Err(wrong(format!("{} bits per sample, the header says {}", bytes * 8, pixel.bits_allocated))),
        })
    }

    fn jpeg_ls(&self, packed: &[u8]) -> Result<Vec<u8>, Rejection> {
        let (rows, columns) = (self.header.rows as u32, self.header.columns as u32);
        let (values, width, height) = jpegls::decode(packed, columns, rows).map_err(|error| match error {
            jpegls::CodecError::Unsupported(what) => unsupported(format!("JPEG-LS: {what}")),
            other => malformed(format!("JPEG-LS: {other}")),
        })?;
        if (width, height) != (columns, rows) || self.header.pixel.samples != 1 {
            return Err(malformed(format!("JPEG-LS: {height} x {width} pixels of one component")));
        }
        Ok(match self.header.pixel.bits_allocated {
            8 => values.iter().map(|v| *v as u8).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }

    fn jpeg_2000(&self, packed: &[u8]) -> Result<Vec<u8>, Rejection> {
        let wrong = |what: String| malformed(format!("JPEG 2000: {what}"));
        let pixel = &self.header.pixel;
        // Size and components are checked in the codestream's own header before the decoder allocates for them.
        let start = packed.windows(4).take(4096).position(|w| w == [0xFF, 0x4F, 0xFF, 0x51]);
        let siz = start.and_then(|at| packed.get(at + 8..at + 42)).ok_or_else(|| wrong("no codestream header".into()))?;
        let long = |at: usize| u32::from_be_bytes([siz[at], siz[at + 1], siz[at + 2], siz[at + 3]]);
        let (width, height) = (long(0).checked_sub(long(8)), long(4).checked_sub(long(12)));
        let components = usize::from(u16::from_be_bytes([siz[32], siz[33]]));
        if (width, height) != (Some(self.header.columns as u32), Some(self.header.rows as u32)) {
            return Err(wrong("its size is not that of the header".into()));
        }
        let (tile_width, tile_height) = (long(16), long(20));
        if components != pixel.samples || tile_width == 0 || tile_height == 0 {
            return Err(wrong(format!("{components} components, the header says {}", pixel.samples)));
        }
        let tiles = u64::from(long(0)).div_ceil(tile_width.into()) * u64::from(long(4)).div_ceil(tile_height.into());
        if tiles > 65_535 {
            return Err(wrong(format!("{tiles} tiles")));
        }
        let image = jpeg2k::Image::from_bytes(packed).map_err(|error| wrong(error.to_string()))?;
        let mut out = vec![0; self.decoded_bytes()];
        let width = usize::from(pixel.bits_allocated / 8);
        let pixels = self.header.rows * self.header.columns;
        for (n, component) in image.components().iter().enumerate().take(pixel.samples) {
            let data = component.data();
            if data.len() != pixels || usize::from(pixel.bits_allocated) < component.precision() as usize {
                return Err(wrong(format!("component {n} does not cover the frame")));
            }
            for (at, value) in data.iter().enumerate() {
                let at = (at * pixel.samples + n) * width;
                out[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
        Ok(out)
    }

    /// Red, green and blue of a palette image (PS3.3 C.7.6.3.1.5), the highest eight bits of each.
    fn palette_colours(&self, samples: &[u8]) -> Result<Vec<u8>, Rejection> {
        let ranges = self.palette.as_ref().ok_or_else(|| malformed("a palette image without its colours"))?;
        let big = self.header.transfer_syntax.encoding.big_endian;
        let word = |bytes: &[u8], n: usize| {
            let pair: [u8; 2] = bytes.get(n * 2..n * 2 + 2)?.try_into().ok()?;
            Some(if big { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) })
        };
        let mut tables: Vec<(i32, Vec<u8>)> = Vec::with_capacity(3);
        for colour in 0..3 {
            let descriptor = &self.bytes[ranges[colour].clone()];
            let data = &self.bytes[ranges[colour + 3].clone()];
            let field = |n| word(descriptor, n).ok_or_else(|| malformed("a palette descriptor is cut"));
            let entries = match field(0)? {
                0 => 65_536,
                n => usize::from(n),
            };
            let first = if self.header.pixel.signed { i32::from(field(1)? as i16) } else { i32::from(field(1)?) };
            let bits = field(2)?;
            let table: Vec<u8> = if data.len() >= entries * 2 {
                // Some writers store 8-bit entries in 16-bit words under a descriptor of 16.
                let words: Vec<u16> = (0..entries).filter_map(|n| word(data, n)).collect();
                let eight = bits == 8 || words.iter().all(|w| *w < 256);
                words.iter().map(|w| if eight { *w as u8 } else { (w >> 8) as u8 }).collect()
            } else {
                data.iter().take(entries).copied().collect()
            };
            if table.is_empty() {
                return Err(malformed("an empty palette"));
            }
            tables.push((first, table));
        }
        let mut samples = samples.to_vec();
        mask(&mut samples, &self.header.pixel);
        let index: Vec<i32> = match self.header.pixel.voxel_type() {
            VoxelType::U8 => samples.iter().map(|v| i32::from(*v)).collect(),
            VoxelType::U16 => samples.chunks_exact(2).map(|b| i32::from(u16::from_le_bytes([b[0], b[1]]))).collect(),
            other => return Err(unsupported(format!("a palette over pixels of {other:?}"))),
        };
        let look = |v: i32, (first, table): &(i32, Vec<u8>)| table[((v - first).max(0) as usize).min(table.len() - 1)];
        Ok(index.iter().flat_map(|v| [look(*v, &tables[0]), look(*v, &tables[1]), look(*v, &tables[2])]).collect())
    }

    fn colour_layout(&self) -> Layout {
        let photometric = self.header.pixel.photometric.as_str();
        match (self.header.transfer_syntax.codec, photometric) {
            (Codec::Native, "YBR_FULL_422") => Layout::Ybr422,
            (Codec::Native | Codec::Rle, "YBR_FULL") => Layout::Ybr,
            // The JPEG decoders undo their own colour transforms.
            _ => Layout::Interleaved,
        }
    }
}

enum Layout {
    Interleaved,
    Ybr,
    Ybr422,
}

/// What colours the components of a JPEG are: its own Adobe or JFIF segment says it, else the data set does. None leaves it
/// to the decoder's usual guess.
fn colour_transform(jpeg: &[u8], photometric: &str) -> Option<jpeg_decoder::ColorTransform> {
    use jpeg_decoder::ColorTransform::{RGB, YCbCr};
    let mut at = 2;
    while let Some([0xFF, marker, high, low]) = jpeg.get(at..at + 4) {
        let end = at + 2 + usize::from(u16::from_be_bytes([*high, *low]));
        match marker {
            0xEE if end >= at + 16 => match jpeg.get(at + 4..at + 16) {
                Some([b'A', b'd', b'o', b'b', b'e', .., 0]) => return Some(RGB),
                Some([b'A', b'd', b'o', b'b', b'e', .., 1]) => return Some(YCbCr),
                _ => {}
            },
            0xE0 if jpeg.get(at + 4..at + 8) == Some(b"JFIF") => return Some(YCbCr),
            0xDA | 0xC0..=0xC3 => break,
            _ => {}
        }
        at = end;
    }
    (photometric == "RGB").then_some(RGB)
}

/// Luminance by ITU-R BT.601, of the width of the components.
pub fn luminance([r, g, b]: [u32; 3]) -> u32 {
    (299 * r + 587 * g + 114 * b + 500) / 1000
}

/// PS3.3 C.7.6.3.1.2.
fn rgb_of_ybr([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (f32::from(y), f32::from(cb) - 128.0, f32::from(cr) - 128.0);
    [y + 1.402 * cr, y - 0.344_136 * cb - 0.714_136 * cr, y + 1.772 * cb].map(|v| v.round().clamp(0.0, 255.0) as u8)
}

/// Luminance bytes in the width of the header's pixels.
fn widen(bytes: &mut Vec<u8>, to: VoxelType) {
    let width = to.bytes();
    if width > 1 {
        let mut wide = vec![0; bytes.len() * width];
        for (chunk, v) in wide.chunks_exact_mut(width).zip(bytes.iter()) {
            chunk[0] = *v;
        }
        *bytes = wide;
    }
}

/// Colour by plane to colour by pixel.
fn interleave(planes: &[u8], pixel: &PixelFormat) -> Vec<u8> {
    let width = usize::from(pixel.bits_allocated / 8);
    let plane = planes.len() / pixel.samples;
    let pixels = plane / width;
    let sample = |p: usize, s: usize| &planes[s * plane + p * width..][..width];
    (0..pixels).flat_map(|p| (0..pixel.samples).map(move |s| (p, s))).flat_map(|(p, s)| sample(p, s)).copied().collect()
}

/// Undoes PackBits into the given places; whether all were filled.
fn unpack_bits(run: &[u8], mut places: impl Iterator<Item = usize>, out: &mut [u8]) -> bool {
    let mut at = 0;
    let mut next = places.next();
    while let (Some(_), Some(control)) = (next, run.get(at)) {
        let control = *control as i8;
        at += 1;
        if control == -128 {
            continue;
        }
        let literal = control >= 0;
        let count = usize::from(control.unsigned_abs()) + 1;
        for n in 0..count {
            let Some(place) = next else { return true };
            let Some(value) = run.get(if literal { at + n } else { at }) else { return false };
            out[place] = *value;
            next = places.next();
        }
        at += if literal { count } else { 1 };
    }
    next.is_none()
}

/// Whether every value is a number that can be measured with; integers always are.
fn all_finite(bytes: &[u8], pixel: &PixelFormat) -> bool {
    match pixel.voxel_type() {
        VoxelType::F32 => bytes.as_chunks().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
        VoxelType::F64 => bytes.as_chunks().0.iter().all(|b| f64::from_le_bytes(*b).is_finite()),
        _ => true,
    }
}

/// Whether bits above Bits Stored are anything but the value's own (zeros, or copies of the sign).
fn needs_masking(bytes: &[u8], pixel: &PixelFormat) -> bool {
    if pixel.float || pixel.bits_stored == pixel.bits_allocated || pixel.bits_allocated == 1 {
        return false;
    }
    if pixel.high_bit + 1 != pixel.bits_stored {
        return true;
    }
    if pixel.bits_allocated != 16 {
        return true;
    }
    // One pass without branches: the compiler makes vectors of it.
    let spare = 16 - u32::from(pixel.bits_stored);
    let values = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    if pixel.signed {
        values.fold(0, |bad, v| bad | (v ^ (((v << spare) as i16) >> spare) as u16)) != 0
    } else {
        values.fold(0, |all, v| all | v) >> pixel.bits_stored != 0
    }
}

/// Removes what is not part of the value, in place.
fn mask(bytes: &mut [u8], pixel: &PixelFormat) {
    if pixel.float || pixel.bits_stored == pixel.bits_allocated || pixel.bits_allocated == 1 {
        return;
    }
    let up = u32::from(pixel.bits_allocated - 1 - pixel.high_bit);
    let down = u32::from(pixel.bits_allocated - pixel.bits_stored);
    macro_rules! apply {
        ($unsigned:ty, $signed:ty, $n:literal) => {
            for b in bytes.chunks_exact_mut($n) {
                let v = <$unsigned>::from_le_bytes((&*b).try_into().expect("chunks of that size")) << up;
                let v = if pixel.signed { ((v as $signed) >> down) as $unsigned } else { v >> down };
                b.copy_from_slice(&v.to_le_bytes());
            }
        };
    }
    match pixel.bits_allocated {
        8 => apply!(u8, i8, 1),
        16 => apply!(u16, i16, 2),
        _ => apply!(u32, i32, 4),
    }
}
