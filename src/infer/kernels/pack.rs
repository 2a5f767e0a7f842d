//! The order of steps and the layout of weights that each kernel wants.

use super::Kernel;

/// A step of the inner loop before it is packed: four bytes of input, and four weights of each channel.
#[derive(Clone)]
pub(super) struct Step {
    /// Tap along the depth.
    pub plane: usize,
    /// Bytes into that plane's rows.
    pub at: usize,
    /// `[lane][4]`.
    pub weights: Vec<[i8; 4]>,
}

/// Steps as a kernel reads them.
pub(super) struct Packed {
    /// Depth tap and place of each quad, then of each step.
    pub offsets: Vec<(usize, usize)>,
    pub quads: usize,
    pub steps: usize,
    pub group: usize,
    pub weights: Vec<i8>,
}

impl Kernel {
    /// What the kernel adds to each activation as it loads it: some multiply signed bytes alone.
    pub(super) fn added_to_activations(self) -> i32 {
        match self {
            Self::Portable | Self::Avx2 | Self::AvxVnni | Self::Vnni | Self::I8mm => 0,
            Self::Neon | Self::Sdot => -128,
        }
    }

    pub(super) fn pack(self, steps: Vec<Step>) -> Packed {
        match self {
            Self::Portable | Self::AvxVnni | Self::Vnni => plain(&steps, 1),
            Self::Avx2 => {
                let (steps, group) = without_saturation(&halved(steps), &[4, 3, 2, 1], 128, pair_loads);
                plain(&steps, group)
            }
            Self::Neon => {
                let four_fit = |four: &[Step]| {
                    let mut sums = vec![0; four[0].weights.len() * 4];
                    for step in four {
                        sums.iter_mut().zip(single_loads(step)).for_each(|(sum, load)| *sum += load.0);
                    }
                    sums.iter().all(|sum| *sum <= 255)
                };
                quads(steps, four_fit, in_order, |ones| without_saturation(ones, &[6, 4, 3, 2, 1], 255, single_loads))
            }
            Self::Sdot => quads(steps, |_| true, in_order, |ones| (ones.to_vec(), 1)),
            Self::I8mm => quads(steps, |_| true, squares, |ones| (ones.to_vec(), 1)),
        }
    }
}

fn plain(steps: &[Step], group: usize) -> Packed {
    Packed {
        offsets: steps.iter().map(|step| (step.plane, step.at)).collect(),
        quads: 0,
        steps: steps.len(),
        group,
        weights: in_order(steps),
    }
}

/// `[step][lane][4]`.
fn in_order(steps: &[Step]) -> Vec<i8> {
    steps.iter().flat_map(|step| step.weights.iter().flatten().copied()).collect()
}

/// Puts runs of four neighbouring steps that `fit` first, the others after them in the order of `arrange`.
fn quads(
    steps: Vec<Step>,
    fit: impl Fn(&[Step]) -> bool,
    pack: impl Fn(&[Step]) -> Vec<i8>,
    arrange: impl Fn(&[Step]) -> (Vec<Step>, usize),
) -> Packed {
    let (mut fours, mut ones) = (Vec::new(), Vec::new());
    let mut rest = steps.as_slice();
    while let Some(first) = rest.first() {
        let run = rest.iter().enumerate().take_while(|(n, step)| step.plane == first.plane && step.at == first.at + 4 * n);
        if run.take(4).count() == 4 && fit(&rest[..4]) {
            fours.push(&rest[..4]);
            rest = &rest[4..];
        } else {
            ones.push(first.clone());
            rest = &rest[1..];
        }
    }
    let (ones, group) = arrange(&ones);
    let mut packed = plain(&ones, group);
    packed.offsets.splice(0..0, fours.iter().map(|four| (four[0].plane, four[0].at)));
    packed.quads = fours.len();
    packed.weights.splice(0..0, fours.iter().flat_map(|four| pack(four)));
    packed
}

/// The layout of USMMLA: for each eight bytes of input, pairs of channels with eight weights each.
fn squares(four: &[Step]) -> Vec<i8> {
    let mut weights = Vec::new();
    for half in four.chunks(2) {
        for lane in 0..half[0].weights.len() {
            weights.extend(half.iter().flat_map(|step| step.weights[lane]));
        }
    }
    weights
}

/// Positive and negative weight that meet in each 16-bit lane of `vpmaddubsw`.
fn pair_loads(step: &Step) -> Vec<(i32, i32)> {
    let pairs = step.weights.iter().flat_map(|w| [[w[0], w[1]], [w[2], w[3]]]);
    pairs
        .map(|pair| {
            let [a, b] = pair.map(i32::from);
            (a.max(0) + b.max(0), -(a.min(0) + b.min(0)))
        })
        .collect()
}

/// The weight in each 16-bit lane of SMULL: activations go down to -128, so its sign does not matter.
fn single_loads(step: &Step) -> Vec<(i32, i32)> {
    step.weights.iter().flatten().map(|weight| (i32::from(*weight).abs(), 0)).collect()
}

/// Splits steps whose pairs of weights could saturate alone into two of half the weights.
fn halved(steps: Vec<Step>) -> Vec<Step> {
    let mut safe = Vec::with_capacity(steps.len());
    for step in steps {
        if pair_loads(&step).iter().all(|(above, below)| *above <= 128 && *below <= 128) {
            safe.push(step);
            continue;
        }
        for second in [false, true] {
            let mut half = step.clone();
            for weight in half.weights.iter_mut().flatten() {
                *weight = if second { *weight - *weight / 2 } else { *weight / 2 };
            }
            safe.push(half);
        }
    }
    safe
}

/// Arranges steps so that sums in 16 bits cannot overflow, whatever the activations are.
///
/// Each 16-bit lane sums, over a group of steps, products of its weights with bytes of up to 255 (x86-64) or down to -128
/// (aarch64). As long as the weights of each lane sum to no more than `bound` (128 * 255 and 255 * 128 fit), every partial
/// sum fits. Groups are filled first-fit under that bound, for the size of group that makes the least work.
fn without_saturation(
    steps: &[Step],
    sizes: &[usize],
    bound: i32,
    load: fn(&Step) -> Vec<(i32, i32)>,
) -> (Vec<Step>, usize) {
    struct Group {
        members: Vec<usize>,
        sums: Vec<(i32, i32)>,
    }
    let loads: Vec<_> = steps.iter().map(load).collect();
    let arrange = |size: usize| {
        let mut groups: Vec<Group> = Vec::new();
        // Full groups are done with: only the open ones are searched.
        let mut open: Vec<usize> = Vec::new();
        for (index, load) in loads.iter().enumerate() {
            let fits = |group: &Group| {
                group.sums.iter().zip(load).all(|(sum, add)| sum.0 + add.0 <= bound && sum.1 + add.1 <= bound)
            };
            match open.iter().position(|at| fits(&groups[*at])) {
                Some(place) => {
                    let group = &mut groups[open[place]];
                    group.members.push(index);
                    group.sums.iter_mut().zip(load).for_each(|(sum, add)| *sum = (sum.0 + add.0, sum.1 + add.1));
                    if group.members.len() == size {
                        open.remove(place);
                    }
                }
                None => {
                    if size > 1 {
                        open.push(groups.len());
                    }
                    groups.push(Group { members: vec![index], sums: load.clone() });
                }
            }
        }
        groups
    };
    if steps.is_empty() {
        return (Vec::new(), 1);
    }
    // A group of n steps costs n multiplications, and one more to widen its sum.
    let tried = sizes.iter().map(|size| (*size, arrange(*size)));
    let (size, groups) = tried.min_by_key(|(size, groups)| groups.len() * (size + 1)).expect("there are sizes to try");
    let mut arranged = Vec::with_capacity(groups.len() * size);
    for Group { members, .. } in groups {
        for n in 0..size {
            arranged.push(match members.get(n) {
                Some(index) => steps[*index].clone(),
                None => {
                    let like = &steps[members[0]];
                    Step { weights: vec![[0; 4]; like.weights.len()], ..*like }
                }
            });
        }
    }
    (arranged, size)
}
