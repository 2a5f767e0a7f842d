//! Every kernel against an oracle that computes in 64 bits, voxel by voxel.

use std::sync::Arc;

use super::graph::{Between, Graph, Kind, Layer, Part, Quant, Requant, Shape, View, Window};
use super::{FloatConv, Kernel, Program};
use crate::pool::Pool;

/// SplitMix64: cases that are the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn from(&mut self, choices: &[usize]) -> usize {
        choices[self.below(choices.len())]
    }

    /// Bytes of one of several tempers: even, or mostly extreme.
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let extreme = self.below(3) == 0;
        (0..count).map(|_| if extreme { [0, 255, 255, 128][self.below(4)] } else { self.next() as u8 }).collect()
    }

    fn weights(&mut self, count: usize) -> Vec<i8> {
        match self.below(4) {
            0 => (0..count).map(|_| [127, -128, -127, 0][self.below(4)]).collect(),
            1 => (0..count).map(|_| self.next() as i8).collect(),
            2 => vec![127; count],
            _ => (0..count).map(|_| (self.next() as i8) / 2).collect(),
        }
    }

    fn quant(&mut self) -> Quant {
        let zero = [0, 255, 128, self.next() as u8][self.below(4)];
        Quant { scale: 1.0, zero, signed: self.below(2) == 0 }
    }
}

const BYTES: Quant = Quant { scale: 1.0, zero: 0, signed: false };

/// A graph whose inputs and outputs are bytes, as floats.
struct Case {
    graph: Graph,
    inputs: Vec<Vec<u8>>,
}

impl Case {
    fn new() -> Self {
        Self { graph: Graph::default(), inputs: Vec::new() }
    }

    fn input(&mut self, shape: Shape, quant: Quant, bytes: Vec<u8>) -> View {
        self.graph.inputs.push(shape);
        self.inputs.push(bytes);
        let input = self.inputs.len() - 1;
        let mut view = self.graph.push("input", Kind::Quantize { input }, vec![], shape, BYTES);
        view.quant = quant;
        view
    }

    fn output(&mut self, view: &View) {
        let view = self.graph.plain("output", view);
        self.graph.outputs.push(view.shape);
        let table = Arc::new(std::array::from_fn(|byte| byte as f32));
        let kind = Kind::Dequantize { output: self.graph.outputs.len() - 1, table, softmax: false };
        self.graph.layers.push(Layer { name: "output".into(), kind, inputs: vec![view], output: None });
    }

    /// The bytes of the first output, `[d][h][w][c]`, from every kernel on one thread and on three: all the same.
    fn run(&self, name: &str) -> Vec<u8> {
        let floats: Vec<Vec<f32>> = self
            .inputs
            .iter()
            .zip(&self.graph.inputs)
            .map(|(bytes, shape)| {
                let planes = (0..bytes.len()).map(|n| bytes[n % shape.voxels() * shape.c + n / shape.voxels()]);
                planes.map(f32::from).collect()
            })
            .collect();
        let inputs: Vec<&[f32]> = floats.iter().map(Vec::as_slice).collect();
        let shape = self.graph.outputs[0];
        let mut first: Option<Vec<u8>> = None;
        for kernel in Kernel::available() {
            for threads in [1, 3] {
                let program = Program::plan(&self.graph, kernel);
                let mut memory = program.memory(threads).unwrap();
                let mut output = vec![-1.0; shape.bytes()];
                program.run(&Pool::new(threads), &mut memory, &inputs, &mut [&mut output]).unwrap();
                // Twice: what a run leaves in the arena must not show in the next.
                program.run(&Pool::new(threads), &mut memory, &inputs, &mut [&mut output]).unwrap();
                let bytes: Vec<u8> =
                    (0..output.len()).map(|n| output[n % shape.c * shape.voxels() + n / shape.c] as u8).collect();
                match &first {
                    None => first = Some(bytes),
                    Some(first) => assert!(*first == bytes, "{name}: {} on {threads} threads", kernel.name()),
                }
            }
        }
        first.expect("the portable kernel is always there")
    }
}

/// Sum to byte, as ONNX Runtime's `QLinearConv` does, in its own words.
fn to_byte(sum: i64, scale: f32, requant: &Requant) -> u8 {
    let scaled = i32::try_from(sum).expect("the oracle's cases stay within 32 bits") as f32 * scale;
    let zero = f32::from(requant.zero);
    let whole = scaled.max(f32::from(requant.low) - zero).min(f32::from(requant.high) - zero).round_ties_even();
    (whole + zero) as u8
}

/// A view as bytes, `[d][h][w][c]`.
fn seen(view: &View, tensors: &[(Shape, Vec<u8>)]) -> Vec<u8> {
    let Shape { d, h, w, .. } = view.shape;
    let mut bytes = Vec::with_capacity(view.shape.bytes());
    for (k, j, i) in (0..d).flat_map(|k| (0..h).flat_map(move |j| (0..w).map(move |i| (k, j, i)))) {
        for part in &view.parts {
            let (shape, data) = &tensors[part.tensor];
            let voxel = (k / part.up[0] * shape.h + j / part.up[1]) * shape.w + i / part.up[2];
            let of = &data[voxel * shape.c..][..shape.c];
            bytes.extend(of.iter().map(|byte| part.map.as_ref().map_or(*byte, |map| map[usize::from(*byte)])));
        }
    }
    bytes
}

#[test]
fn convolutions_agree_with_a_64_bit_oracle_for_any_shape_and_extreme_values() {
    let mut random = Random(1);
    for case in 0..220 {
        let flat = random.below(3) == 0;
        let axes = |random: &mut Random, choices: &[usize], rest: usize| {
            let mut all = [0; 3].map(|_| random.from(choices));
            if flat {
                all[0] = rest;
            }
            all
        };
        let kernel = axes(&mut random, &[1, 1, 2, 3, 3, 3, 5], 1);
        let stride = axes(&mut random, &[1, 1, 1, 2, 3], 1);
        let dilation = axes(&mut random, &[1, 1, 1, 2], 1);
        let pad = |random: &mut Random| -> [usize; 3] { std::array::from_fn(|axis| random.below(kernel[axis])) };
        let window = Window { kernel, stride, dilation, before: pad(&mut random), after: pad(&mut random) };
        let window = if case % 5 == 0 { Window::POINT } else { window };
        let space = [if flat { 1 } else { 2 * (1 + random.below(4)) }, 2 * (1 + random.below(7)), 2 * (1 + random.below(20))];
        let Some(output) = window.over(space) else { continue };
        let groups = random.from(&[1, 1, 1, 2, 4]);
        let depthwise = random.below(6) == 0;
        let [own, outs] = if depthwise {
            [1, 1]
        } else {
            [0; 2].map(|_| random.from(&[1, 2, 3, 4, 7, 8, 9, 16, 17, 24, 33]))
        };
        let groups = if depthwise { random.from(&[3, 8, 20]) } else { groups };
        let (channels, outputs) = (own * groups, outs * groups);
        // The input as a view of one to three parts, some enlarged, some mapped.
        let mut build = Case::new();
        let quant = random.quant();
        let mut parts = Vec::new();
        let mut left = channels;
        while left > 0 {
            let c = if parts.len() == 2 || random.below(2) == 0 { left } else { 1 + random.below(left) };
            let up: [usize; 3] = std::array::from_fn(|axis| if space[axis] % 2 == 0 { 1 + random.below(2) } else { 1 });
            let shape = Shape { d: space[0] / up[0], h: space[1] / up[1], w: space[2] / up[2], c };
            let bytes = random.bytes(shape.bytes());
            let view = build.input(shape, quant, bytes);
            let table = random.bytes(256);
            let map = (random.below(3) == 0).then(|| Arc::new(std::array::from_fn(|n| table[n])));
            parts.push(Part { tensor: view.plain().unwrap(), up, map });
            left -= c;
        }
        let [d, h, w] = space;
        let view = View { parts, shape: Shape { d, h, w, c: channels }, quant };
        let taps = window.taps();
        let weights = random.weights(outputs * taps * own);
        let bias: Vec<i32> = (0..outputs).map(|_| random.next() as i16 as i32 * 3).collect();
        let spread = 1.0 / (64.0 * ((taps * own) as f32).sqrt() * 40.0);
        let scale: Vec<f32> = (0..outputs).map(|_| spread * (1 + random.below(100)) as f32 / 30.0).collect();
        let low = [0, random.next() as u8 / 4][random.below(2)];
        let requant = Requant { scale, zero: random.quant().zero, low, high: 255 - low / 2 };
        let shape = Shape { c: outputs, ..view.shape }.with_space(output);
        let kind = Kind::Conv {
            window,
            groups,
            weights: Arc::new(weights.clone()),
            bias: bias.clone(),
            requant: requant.clone(),
        };
        let result = build.graph.push("conv", kind, vec![view.clone()], shape, BYTES);
        build.output(&result);
        let got = build.run(&format!("case {case}: {window:?} groups {groups} {:?} -> {shape:?}", view.shape));

        let tensors: Vec<(Shape, Vec<u8>)> = build.graph.inputs.iter().copied().zip(build.inputs.iter().cloned()).collect();
        let input = seen(&view, &tensors);
        for (n, got) in got.iter().enumerate() {
            let (voxel, channel) = (n / outputs, n % outputs);
            let at = [voxel / (shape.h * shape.w), voxel / shape.w % shape.h, voxel % shape.w];
            let mut sum = i64::from(bias[channel]);
            for tap in 0..taps {
                let offset = [tap / (window.kernel[1] * window.kernel[2]), tap / window.kernel[2] % window.kernel[1], tap % window.kernel[2]];
                let place: Option<Vec<usize>> = (0..3)
                    .map(|a| (at[a] * window.stride[a] + offset[a] * window.dilation[a]).checked_sub(window.before[a]).filter(|p| *p < space[a]))
                    .collect();
                let Some(place) = place else { continue };
                let voxel = (place[0] * space[1] + place[1]) * space[2] + place[2];
                for c in 0..own {
                    let byte = input[voxel * channels + channel / outs * own + c];
                    let weight = weights[(channel * taps + tap) * own + c];
                    sum += (i64::from(byte) - i64::from(quant.zero)) * i64::from(weight);
                }
            }
            let want = to_byte(sum, requant.scale[channel], &requant);
            assert_eq!(*got, want, "case {case}, output {n}: {window:?} groups {groups} {:?} -> {shape:?}", view.shape);
        }
    }
}

#[test]
fn transposed_convolutions_agree_with_a_64_bit_oracle() {
    let mut random = Random(2);
    for case in 0..30 {
        // Blocks of one to three, windows of one to three taps a side, and outputs cut short of whole blocks.
        let block = [1 + random.below(2), 1 + random.below(3), 1 + random.below(3)];
        let point = random.below(2) == 0;
        let kernel = [0; 3].map(|_| if point { 1 } else { 1 + random.below(3) });
        let before = kernel.map(|k| random.below(k));
        let window = Window { kernel, before, ..Window::POINT };
        let groups = random.from(&[1, 1, 2]);
        let own = random.from(&[1, 3, 8, 18]);
        let input = Shape { d: 1 + random.below(3), h: 1 + random.below(5), w: 1 + random.below(21), c: own * groups };
        let outputs = random.from(&[1, 5, 8, 16, 21]) * groups;
        let (taps, phases) = (window.taps(), block.iter().product::<usize>());
        let quant = random.quant();
        let mut build = Case::new();
        let bytes = random.bytes(input.bytes());
        let view = build.input(input, quant, bytes.clone());
        let mut weights = random.weights(phases * outputs * taps * own);
        // Some voxels of the block hear some taps alone.
        let deaf: Vec<bool> = (0..phases * taps).map(|_| random.below(3) == 0).collect();
        weights.iter_mut().enumerate().for_each(|(n, w)| if deaf[n / (own * taps * outputs) * taps + n / own % taps] { *w = 0 });
        let bias: Vec<i32> = (0..outputs).map(|_| random.next() as i16 as i32).collect();
        let scale: Vec<f32> = (0..outputs).map(|_| (1 + random.below(90)) as f32 * 1e-4).collect();
        let requant = Requant { scale, zero: random.quant().zero, low: 0, high: 255 };
        let space = input.space();
        let cut = block.map(|b| random.below(b));
        let shape = Shape { c: outputs, ..input }.with_space(std::array::from_fn(|axis| space[axis] * block[axis] - cut[axis]));
        let kind = Kind::Spread {
            window,
            block,
            taps,
            groups,
            weights: Arc::new(weights.clone()),
            bias: bias.clone(),
            requant: requant.clone(),
        };
        let result = build.graph.push("spread", kind, vec![view], shape, BYTES);
        build.output(&result);
        for (n, got) in build.run("spread").iter().enumerate() {
            let (voxel, channel) = (n / outputs, n % outputs);
            let at = [voxel / (shape.h * shape.w), voxel / shape.w % shape.h, voxel % shape.w];
            let phase = (at[0] % block[0] * block[1] + at[1] % block[1]) * block[2] + at[2] % block[2];
            let mut sum = i64::from(bias[channel]);
            for tap in 0..taps {
                let offset = [tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]];
                let place: Option<Vec<usize>> = (0..3)
                    .map(|a| (at[a] / block[a] + offset[a]).checked_sub(before[a]).filter(|p| *p < space[a]))
                    .collect();
                let Some(place) = place else { continue };
                let voxel = (place[0] * space[1] + place[1]) * space[2] + place[2];
                for c in 0..own {
                    let byte = i64::from(bytes[voxel * input.c + channel / (outputs / groups) * own + c]) - i64::from(quant.zero);
                    sum += byte * i64::from(weights[((phase * outputs + channel) * taps + tap) * own + c]);
                }
            }
            assert_eq!(*got, to_byte(sum, requant.scale[channel], &requant), "case {case}, {n}: {window:?} {block:?}");
        }
    }
}

#[test]
fn resampling_is_exact_where_weights_are_dyadic_and_rounds_to_the_nearest_byte_elsewhere() {
    let mut random = Random(5);
    for case in 0..40 {
        let dyadic = case % 2 == 0;
        let input = Shape { d: 1 + random.below(4), h: 1 + random.below(5), w: 1 + random.below(9), c: random.from(&[1, 3, 8, 16]) };
        let quant = random.quant();
        let to = Quant { scale: if dyadic { 0.5 } else { 1.7 }, ..random.quant() };
        let space = input.space();
        let axes: [Vec<Between>; 3] = std::array::from_fn(|axis| {
            let between = |random: &mut Random| {
                let at = random.below(space[axis]);
                let far = if dyadic { random.below(4) as f32 / 4.0 } else { random.below(1000) as f32 / 999.0 };
                Between { at: [at, (at + 1).min(space[axis] - 1)], weight: [1.0 - far, far] }
            };
            (0..1 + random.below(9)).map(|_| between(&mut random)).collect()
        });
        let mut build = Case::new();
        let bytes = random.bytes(input.bytes());
        let view = build.input(input, quant, bytes.clone());
        let shape = input.with_space(std::array::from_fn(|axis| axes[axis].len()));
        let result = build.graph.push("resample", Kind::Resample { axes: axes.clone(), cut: false }, vec![view], shape, to);
        build.output(&result);
        for (n, got) in build.run("resample").iter().enumerate() {
            let (voxel, c) = (n / shape.c, n % shape.c);
            let at = [axes[0][voxel / (shape.h * shape.w)], axes[1][voxel / shape.w % shape.h], axes[2][voxel % shape.w]];
            let real: f64 = (0..8)
                .map(|corner| {
                    let side = [corner / 4, corner / 2 % 2, corner % 2];
                    let [d, h, w]: [usize; 3] = std::array::from_fn(|a| at[a].at[side[a]]);
                    let weight: f64 = (0..3).map(|a| f64::from(at[a].weight[side[a]])).product();
                    weight * f64::from(quant.real(bytes[((d * input.h + h) * input.w + w) * input.c + c]))
                })
                .sum();
            let exact = (real / f64::from(to.scale)).clamp(-f64::from(to.zero), 255.0 - f64::from(to.zero));
            if dyadic {
                assert_eq!(f64::from(*got), exact.round_ties_even() + f64::from(to.zero), "case {case}, {n}");
            } else {
                assert!((f64::from(*got) - exact - f64::from(to.zero)).abs() < 0.501, "case {case}, {n}: {got} for {exact}");
            }
        }
    }
}

#[test]
fn a_softmax_gives_the_byte_nearest_to_each_channels_part() {
    let mut random = Random(7);
    for case in 0..20 {
        let shape = Shape { d: 1, h: 3, w: 5, c: random.from(&[1, 2, 5, 17]) };
        let scale = (1 + random.below(100)) as f32 / 700.0;
        let (bytes, to) = (random.bytes(shape.bytes()), Quant { scale: 1.0 / 256.0, zero: 0, signed: false });
        let mut build = Case::new();
        let view = build.input(shape, BYTES, bytes.clone());
        let table = Arc::new(std::array::from_fn(|byte| (-(byte as f64) * f64::from(scale)).exp() as f32));
        let result = build.graph.push("softmax", Kind::Softmax(table), vec![view], shape, to);
        build.output(&result);
        for (n, got) in build.run("softmax").iter().enumerate() {
            let real = |byte: &u8| (f64::from(*byte) * f64::from(scale)).exp();
            let sum: f64 = bytes[n / shape.c * shape.c..][..shape.c].iter().map(real).sum();
            let exact = (real(&bytes[n]) / sum * 256.0).min(255.0);
            assert!((f64::from(*got) - exact).abs() < 0.501, "case {case}, {n}: {got} for {exact}");
        }
    }
}

#[test]
fn float_convolutions_are_one_chain_of_fused_multiply_adds_on_every_processor() {
    let mut random = Random(6);
    for case in 0..60 {
        let kernel = [random.from(&[1, 1, 3]), random.from(&[1, 2, 3]), random.from(&[1, 3, 5])];
        let window = Window {
            kernel,
            stride: [0; 3].map(|_| random.from(&[1, 1, 2, 3])),
            dilation: [0; 3].map(|_| random.from(&[1, 1, 2])),
            before: kernel.map(|k| random.below(k)),
            after: kernel.map(|k| random.below(k)),
        };
        let window = if case % 6 == 0 { Window::POINT } else { window };
        let groups = random.from(&[1, 1, 2, 5]);
        let [own, outs] = [0; 2].map(|_| random.from(&[1, 2, 3, 8, 9]));
        let wide = random.below(8) == 0;
        let input = Shape { d: 1 + random.below(3), h: 1 + random.below(5), w: 1 + random.below(if wide { 700 } else { 40 }), c: own * groups };
        let Some(space) = window.over(input.space()) else { continue };
        let output = Shape { c: outs * groups, ..input }.with_space(space);
        let mut real = || (random.next() as i32) as f32 / 2e9;
        let (x, weights): (Vec<f32>, Vec<f32>) =
            ((0..input.bytes()).map(|_| real()).collect(), (0..output.c * own * window.taps()).map(|_| real()).collect());
        let bias: Vec<f32> = (0..output.c).map(|_| real()).collect();
        let relu = case % 2 == 0;
        let run = |kernel: Kernel, threads: usize| {
            let conv = FloatConv::plan(input, output, window, groups, &weights, &bias, relu, kernel);
            let mut y = vec![f32::NAN; output.bytes()];
            conv.run(&Pool::new(threads), &mut conv.memory(1).unwrap(), &x, &mut y).unwrap();
            y
        };
        let want: Vec<f32> = (0..output.bytes())
            .map(|n| {
                let (channel, voxel) = (n / output.voxels(), n % output.voxels());
                let at = [voxel / (output.h * output.w), voxel / output.w % output.h, voxel % output.w];
                let mut sum = bias[channel];
                for step in 0..own * window.taps() {
                    let (c, tap) = (step / window.taps(), step % window.taps());
                    let tap = [tap / (window.kernel[1] * window.kernel[2]), tap / window.kernel[2] % window.kernel[1], tap % window.kernel[2]];
                    let place: Option<Vec<usize>> = (0..3)
                        .map(|a| (at[a] * window.stride[a] + tap[a] * window.dilation[a]).checked_sub(window.before[a]).filter(|p| *p < input.space()[a]))
                        .collect();
                    let seen = place.map_or(0.0, |p| {
                        x[(((channel / outs * own + c) * input.d + p[0]) * input.h + p[1]) * input.w + p[2]]
                    });
                    sum = seen.mul_add(weights[channel * own * window.taps() + step], sum);
                }
                if relu { sum.max(0.0) } else { sum }
            })
            .collect();
        for (kernel, threads) in [(Kernel::Portable, 1), (Kernel::best(), 1), (Kernel::best(), 3)] {
            let got = run(kernel, threads);
            assert!(got == want, "case {case}: {window:?} groups {groups} {input:?} -> {output:?} on {}", kernel.name());
        }
    }
}

#[test]
fn the_largest_byte_of_each_window_wins_and_padding_never_does() {
    let mut random = Random(3);
    for case in 0..60 {
        let kernel = [0; 3].map(|_| random.from(&[1, 2, 2, 3]));
        let window = Window {
            kernel,
            stride: [0; 3].map(|_| 1 + random.below(2)),
            dilation: [1; 3],
            before: kernel.map(|k| random.below(k)),
            after: kernel.map(|k| random.below(k)),
        };
        let input = Shape { d: 1 + random.below(5), h: 1 + random.below(6), w: 1 + random.below(9), c: random.from(&[1, 3, 8, 16, 32]) };
        let Some(space) = window.over(input.space()) else { continue };
        let mut build = Case::new();
        let bytes = random.bytes(input.bytes());
        let view = build.input(input, BYTES, bytes.clone());
        let shape = input.with_space(space);
        let result = build.graph.push("pool", Kind::MaxPool(window), vec![view], shape, BYTES);
        build.output(&result);
        for (n, got) in build.run("pool").iter().enumerate() {
            let (voxel, channel) = (n / shape.c, n % shape.c);
            let at = [voxel / (shape.h * shape.w), voxel / shape.w % shape.h, voxel % shape.w];
            let range = |axis: usize| {
                let start = at[axis] * window.stride[axis];
                (start..start + kernel[axis]).filter_map(move |p| p.checked_sub(window.before[axis])).filter(move |p| *p < input.space()[axis])
            };
            let want = range(0)
                .flat_map(|d| range(1).flat_map(move |h| range(2).map(move |w| (d, h, w))))
                .map(|(d, h, w)| bytes[((d * input.h + h) * input.w + w) * input.c + channel])
                .max();
            assert_eq!(*got, want.unwrap_or(0), "case {case}: {window:?} over {input:?} at {n}");
        }
    }
}

#[test]
fn sums_products_and_means_round_as_their_formulas_say() {
    let mut random = Random(4);
    for case in 0..40 {
        let quant = |random: &mut Random| Quant { scale: (1 + random.below(200)) as f32 / 97.0, ..random.quant() };
        let (qa, qb, to) = (quant(&mut random), quant(&mut random), quant(&mut random));
        let shape = Shape { d: 2, h: 2 * (1 + random.below(3)), w: 2 * (1 + random.below(9)), c: random.from(&[1, 5, 16]) };
        let (a, b) = (random.bytes(shape.bytes()), random.bytes(shape.bytes()));
        for kind in [Kind::Add { low: 0 }, Kind::Multiply] {
            let mut build = Case::new();
            let views = vec![build.input(shape, qa, a.clone()), build.input(shape, qb, b.clone())];
            let result = build.graph.push("two", kind.clone(), views, shape, to);
            build.output(&result);
            for (n, got) in build.run("two").iter().enumerate() {
                let (x, y) = (f64::from(qa.real(a[n])), f64::from(qb.real(b[n])));
                let real = if kind == Kind::Multiply { x * y } else { x + y };
                let exact = (real / f64::from(to.scale) + f64::from(to.zero)).clamp(0.0, 255.0);
                assert!((f64::from(*got) - exact).abs() <= 0.501, "case {case}: {kind:?} {got} for {exact}");
            }
        }
        let window = Window { kernel: [2; 3], stride: [2; 3], ..Window::POINT };
        let mut build = Case::new();
        let view = build.input(shape, qa, a.clone());
        let half = shape.with_space(shape.space().map(|extent| extent / 2));
        let kind = Kind::AveragePool { window, count_padding: false };
        let result = build.graph.push("mean", kind, vec![view], half, to);
        build.output(&result);
        for (n, got) in build.run("mean").iter().enumerate() {
            let (voxel, c) = (n / half.c, n % half.c);
            let at = [voxel / (half.h * half.w), voxel / half.w % half.h, voxel % half.w];
            let sum: f64 = (0..8)
                .map(|tap| [2 * at[0] + tap / 4, 2 * at[1] + tap / 2 % 2, 2 * at[2] + tap % 2])
                .map(|[d, h, w]| f64::from(qa.real(a[((d * shape.h + h) * shape.w + w) * shape.c + c])))
                .sum();
            let exact = (sum / 8.0 / f64::from(to.scale) + f64::from(to.zero)).clamp(0.0, 255.0);
            assert!((f64::from(*got) - exact).abs() <= 0.501, "case {case}: mean {got} for {exact}");
        }
        let mut build = Case::new();
        let view = build.input(shape, qa, a.clone());
        let result = build.graph.push("mean", Kind::GlobalAveragePool, vec![view], shape.with_space([1; 3]), to);
        build.output(&result);
        for (c, got) in build.run("global mean").iter().enumerate() {
            let sum: f64 = a[c..].iter().step_by(shape.c).map(|byte| f64::from(qa.real(*byte))).sum();
            let exact = sum / shape.voxels() as f64 / f64::from(to.scale) + f64::from(to.zero);
            assert!((f64::from(*got) - exact.clamp(0.0, 255.0)).abs() <= 0.501, "case {case}: global mean {got} for {exact}");
        }
    }
}

#[test]
fn floats_become_the_nearest_bytes_and_anything_else_the_bounds() {
    let quant = Quant { scale: 0.25, zero: 100, signed: false };
    let values = [0.0, 0.125, 0.375, -0.125, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 38.75, 39.0, -25.0, 1.0];
    let bytes = [100.0, 100.0, 102.0, 100.0, 255.0, 0.0, 255.0, 0.0, 0.0, 255.0, 255.0, 0.0, 104.0];
    // Each channel begins elsewhere; four of them go together where a kernel has instructions for it.
    for c in [1, 4, 7] {
        let turned = |all: &[f32; 13]| -> Vec<f32> { (0..c * 13).map(|n| all[(n / 13 + n) % 13]).collect() };
        let shape = Shape { d: 1, h: 1, w: values.len(), c };
        let mut build = Case::new();
        build.graph.inputs.push(shape);
        let view = build.graph.push("input", Kind::Quantize { input: 0 }, vec![], shape, quant);
        build.output(&view);
        for kernel in Kernel::available() {
            let program = Program::plan(&build.graph, kernel);
            let mut output = vec![0.0; values.len() * c];
            let run = program.run(&Pool::new(1), &mut program.memory(1).unwrap(), &[&turned(&values)], &mut [&mut output]);
            run.unwrap();
            assert_eq!(output, turned(&bytes), "{} on {c} channels", kernel.name());
        }
    }
}
