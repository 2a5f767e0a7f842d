//! What is refused, and what the smallest networks give.

use tract_onnx::pb::{
    AttributeProto, GraphProto, OperatorSetIdProto, TensorProto, TypeProto, ValueInfoProto, tensor_shape_proto,
    type_proto,
};

use super::*;

fn tensor(name: &str, dims: &[i64], float_data: Vec<f32>) -> TensorProto {
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: 1, float_data, ..Default::default() }
}

fn bytes(name: &str, dims: &[i64], values: &[i32]) -> TensorProto {
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: 3, int32_data: values.to_vec(), ..Default::default() }
}

fn node(operator: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        name: format!("the {operator} of {output}"),
        op_type: operator.into(),
        input: inputs.iter().map(|name| (*name).into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

fn info(name: &str, dims: Option<&[i64]>) -> ValueInfoProto {
    use tensor_shape_proto::{Dimension, dimension::Value};
    let shape = dims.map(|dims| tract_onnx::pb::TensorShapeProto {
        dim: dims
            .iter()
            .map(|dim| Dimension {
                value: Some(if *dim < 0 { Value::DimParam("n".into()) } else { Value::DimValue(*dim) }),
                ..Default::default()
            })
            .collect(),
    });
    let value = Some(type_proto::Value::TensorType(type_proto::Tensor { elem_type: 1, shape }));
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value, ..Default::default() }), ..Default::default() }
}

/// A network of one input `x` and one output `y`.
fn network(dims: &[i64], nodes: Vec<NodeProto>, constants: Vec<TensorProto>) -> ModelProto {
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 13 }],
        graph: Some(GraphProto {
            node: nodes,
            initializer: constants,
            input: vec![info("x", Some(dims))],
            output: vec![info("y", None)],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A quantized convolution of weight 1 between scales of a half, with `scale` for its input.
fn quantized(dims: &[i64], scale: f32) -> ModelProto {
    let nodes = vec![
        node("QuantizeLinear", &["x", "s", "z"], "xq"),
        node("DequantizeLinear", &["xq", "s", "z"], "xd"),
        node("DequantizeLinear", &["w", "one", "z"], "wd"),
        node("Conv", &["xd", "wd"], "c"),
        node("QuantizeLinear", &["c", "half", "z"], "yq"),
        node("DequantizeLinear", &["yq", "half", "z"], "y"),
    ];
    let constants = vec![
        tensor("s", &[], vec![scale]),
        tensor("half", &[], vec![0.5]),
        tensor("one", &[], vec![1.0]),
        bytes("z", &[], &[0]),
        bytes("w", &[1, 1, 1, 1], &[1]),
    ];
    network(dims, nodes, constants)
}

fn load(model: &ModelProto) -> Result<Network, EngineError> {
    let mut model = model.clone();
    onnx::prepare(&mut model)?;
    guarded(|| Network::plan(&model, Some(Kernel::best())), EngineError::Load)
}

/// What is wrong unless the network is refused and the sentence names the culprit.
fn complaint(model: &ModelProto, names: &str) -> Option<String> {
    match load(model) {
        Err(EngineError::Load(text)) if text.contains(names) => None,
        Err(other) => Some(format!("{other} does not name {names:?}")),
        Ok(_) => Some(format!("it was accepted, though {names:?} is wrong")),
    }
}

/// The network is refused, and the sentence names the culprit.
fn check_refused(model: &ModelProto, names: &str) {
    assert_eq!(complaint(model, names), None);
}

#[test]
fn a_quantized_convolution_of_weight_one_returns_its_input() {
    let network = load(&quantized(&[1, 1, 2, 3], 0.5)).unwrap();
    assert!(network.is_all_integer());
    let x = ArrayD::from_shape_vec(IxDyn(&[1, 1, 2, 3]), vec![0.0, 0.5, -1.0, 63.5, 1000.0, -1000.0]).unwrap();
    let y = network.session().unwrap().run(&Pool::new(1), &[x.view()]).unwrap();
    assert_eq!(y[0].as_slice().unwrap(), [0.0, 0.5, -1.0, 63.5, 63.5, -64.0]);
}

#[test]
fn volumes_of_a_batch_are_computed_one_by_one() {
    let network = load(&quantized(&[2, 1, 1, 2], 0.5)).unwrap();
    let x = ArrayD::from_shape_vec(IxDyn(&[2, 1, 1, 2]), vec![1.0, 2.0, 3.0, 4.0]).unwrap();
    assert_eq!(network.session().unwrap().run(&Pool::new(2), &[x.view()]).unwrap()[0], x);
}

#[test]
fn an_input_of_another_shape_is_told_with_both_shapes() {
    let network = load(&quantized(&[1, 1, 2, 3], 0.5)).unwrap();
    let x = ArrayD::<f32>::zeros(IxDyn(&[1, 1, 3, 2]));
    let error = network.session().unwrap().run(&Pool::new(1), &[x.view()]).unwrap_err();
    assert!(matches!(error, EngineError::InputShape { index: 0, .. }), "{error}");
    assert!(network.session().unwrap().run(&Pool::new(1), &[]).is_err());
}

#[test]
fn scales_that_are_no_positive_numbers_are_refused() {
    for scale in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
        check_refused(&quantized(&[1, 1, 2, 3], scale), "the QuantizeLinear");
    }
}

#[test]
fn an_operator_that_nobody_has_is_named() {
    check_refused(&network(&[1, 1, 4, 4], vec![node("Telepathy", &["x"], "y")], vec![]), "Telepathy");
}

#[test]
fn shapes_that_cannot_be_planned_are_refused_before_anything_is_allocated() {
    for dims in [&[1i64, 1, 0, 4][..], &[1, 1, -1, 4], &[1, 1 << 20, 1 << 20, 4]] {
        check_refused(&quantized(dims, 0.5), "\"x\"");
    }
    let sized = |operator: &str, dims: Vec<i64>| {
        let size = TensorProto {
            name: "size".into(),
            dims: vec![dims.len() as i64],
            data_type: 7,
            int64_data: dims,
            ..Default::default()
        };
        network(&[1, 1, 4, 4], vec![node(operator, &["x", "size"], "y")], vec![size])
    };
    check_refused(&sized("Expand", vec![1 << 20, 1 << 20, 4, 4]), "the Expand");
    check_refused(&sized("Tile", vec![1 << 20, 1 << 20, 1, 1]), "the Tile");
    // The shape of an input is known, its numbers are not.
    let mut dynamic = network(&[4], vec![node("Cast", &["x"], "s"), node("ConstantOfShape", &["s"], "y")], vec![]);
    with(&mut dynamic, 0, AttributeProto { name: "to".into(), r#type: 2, i: 7, ..Default::default() });
    check_refused(&dynamic, "the ConstantOfShape");
    let mut wide = quantized(&[1, 1, 4, 4], 0.5);
    let pads = AttributeProto { name: "pads".into(), r#type: 7, ints: vec![1 << 40; 4], ..Default::default() };
    wide.graph.as_mut().unwrap().node[3].attribute.push(pads);
    check_refused(&wide, "the Conv");
}

#[test]
fn weights_without_data_or_in_other_files_are_refused() {
    let mut model = quantized(&[1, 1, 4, 4], 0.5);
    model.graph.as_mut().unwrap().initializer[4].dims = vec![1 << 14, 1, 1 << 10, 1];
    check_refused(&model, "\"w\"");
    let mut model = quantized(&[1, 1, 4, 4], 0.5);
    model.graph.as_mut().unwrap().initializer[4].data_location = Some(1);
    check_refused(&model, "another file");
}

#[test]
fn graphs_that_hang_in_the_air_are_refused() {
    check_refused(&network(&[1, 1, 4, 4], vec![node("Relu", &["nothing"], "y")], vec![]), "nothing");
    check_refused(&network(&[1, 1, 4, 4], vec![node("Relu", &["x"], "z")], vec![]), "\"y\"");
    check_refused(&network(&[1, 1, 4, 4], vec![node("Relu", &["x"], "y"), node("Relu", &["x"], "y")], vec![]), "\"y\"");
    assert!(matches!(Network::load(b""), Err(EngineError::Load(_))));
    assert!(matches!(Network::load(b"PK\x03\x04 no network"), Err(EngineError::Load(_))));
}

fn with(model: &mut ModelProto, node: usize, attribute: AttributeProto) {
    model.graph.as_mut().unwrap().node[node].attribute.push(attribute);
}

fn ints(name: &str, ints: Vec<i64>) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: 7, ints, ..Default::default() }
}

#[test]
fn scales_of_weights_and_results_must_be_positive_numbers_too() {
    for (at, who) in [(1, "the QuantizeLinear"), (2, "the DequantizeLinear")] {
        let mut model = quantized(&[1, 1, 2, 3], 0.5);
        model.graph.as_mut().unwrap().initializer[at].float_data = vec![f32::NAN];
        check_refused(&model, who);
    }
}

#[test]
fn data_in_other_files_is_refused_wherever_it_hides_and_whatever_path_it_names() {
    let entry = |value: &str| tract_onnx::pb::StringStringEntryProto { key: "location".into(), value: value.into() };
    for path in ["weights.bin", "../../etc/shadow", "/dev/zero", ""] {
        let mut model = quantized(&[1, 1, 4, 4], 0.5);
        model.graph.as_mut().unwrap().initializer[4].external_data = vec![entry(path)];
        check_refused(&model, "\"w\"");
        let mut model = network(&[1, 1, 4, 4], vec![node("Constant", &[], "c"), node("Add", &["x", "c"], "y")], vec![]);
        let value = TensorProto { external_data: vec![entry(path)], data_location: Some(1), ..tensor("", &[1], vec![]) };
        with(&mut model, 0, AttributeProto { name: "value".into(), r#type: 4, t: Some(value), ..Default::default() });
        check_refused(&model, "the Constant");
    }
}

#[test]
fn resizing_beyond_all_bounds_is_refused_before_anything_is_allocated() {
    let scales = |values: Vec<f32>| tensor("scales", &[values.len() as i64], values);
    for values in [vec![1.0, 1.0, 1e9, 1e9], vec![1.0, 1.0, f32::INFINITY, 1.0]] {
        let mut model = quantized(&[1, 1, 4, 4], 0.5);
        let graph = model.graph.as_mut().unwrap();
        graph.node.insert(2, node("Resize", &["xd", "", "scales"], "large"));
        graph.node[4].input[0] = "large".into();
        graph.initializer.push(scales(values));
        check_refused(&model, "the Resize");
    }
}

#[test]
fn a_float_convolution_with_its_relu_runs_in_our_kernel_where_it_is_fast_and_to_the_bits_of_its_definition() {
    let mut model = network(
        &[1, 1, 1, 3],
        vec![node("Conv", &["x", "w", "b"], "c"), node("Relu", &["c"], "y")],
        vec![tensor("w", &[2, 1, 1, 1], vec![2.0, -1.0]), tensor("b", &[2], vec![0.5, 0.25])],
    );
    model.graph.as_mut().unwrap().node[0].attribute.push(ints("kernel_shape", vec![1, 1]));
    let network = load(&model).unwrap();
    // Without fused multiply-adds in hardware it is tract's, and of the same definition.
    let ours = network.explain().iter().filter(|step| step.place == "float").count();
    assert_eq!(ours, usize::from(crate::infer::kernels::FloatConv::is_fast()));
    let x = ArrayD::from_shape_vec(IxDyn(&[1, 1, 1, 3]), vec![1.0, -1.0, 0.0]).unwrap();
    let y = network.session().unwrap().run(&Pool::new(2), &[x.view()]).unwrap();
    assert_eq!(y[0].shape(), [1, 2, 1, 3]);
    assert_eq!(y[0].as_slice().unwrap(), [2.5, 0.0, 0.5, 0.0, 1.25, 0.25]);
}

/// A layer of these weights between quantizers, or the same in floats.
fn layer(operator: &str, dims: &[i64], weights: &[i64], quantize: bool) -> ModelProto {
    let count = usize::try_from(weights.iter().product::<i64>()).unwrap();
    if !quantize {
        return network(dims, vec![node(operator, &["x", "w"], "y")], vec![tensor("w", weights, vec![1.0; count])]);
    }
    let mut model = quantized(dims, 0.5);
    let graph = model.graph.as_mut().unwrap();
    graph.node[3] = node(operator, &["xd", "wd"], "c");
    graph.initializer[4] = bytes("w", weights, &vec![1; count]);
    model
}

/// A layer without weights, likewise.
fn pool(operator: &str, dims: &[i64], quantize: bool) -> ModelProto {
    let mut model = layer(operator, dims, &[1], quantize);
    model.graph.as_mut().unwrap().node.iter_mut().filter(|n| n.op_type == operator).for_each(|n| n.input.truncate(1));
    model
}

/// Complaints about a series of networks, told together.
#[derive(Default)]
struct Complaints(Vec<String>);

impl Complaints {
    /// The network is refused with the node's name.
    fn refused(&mut self, what: &str, model: &ModelProto, names: &str) {
        self.0.extend(complaint(model, names).map(|text| format!("{what}: {text}")));
    }

    /// It is, in integers as in floats, when its layer has these attributes.
    fn attributes(&mut self, model: impl Fn(bool) -> ModelProto, operator: &str, attributes: &[(&str, Vec<i64>)]) {
        for quantize in [true, false] {
            let mut model = model(quantize);
            let at = model.graph.as_ref().unwrap().node.iter().position(|node| node.op_type == operator).unwrap();
            for (name, values) in attributes {
                with(&mut model, at, match *name {
                    "group" => AttributeProto { name: "group".into(), r#type: 2, i: values[0], ..Default::default() },
                    name => ints(name, values.clone()),
                });
            }
            self.refused(&format!("{attributes:?}, quantized: {quantize}"), &model, &format!("the {operator}"));
        }
    }

    fn none(self) {
        assert!(self.0.is_empty(), "{:#?}", self.0);
    }
}

#[test]
fn kernels_larger_than_their_padded_input_are_refused_by_name() {
    let mut complaints = Complaints::default();
    let convolution = |kernel: i64| move |quantize| layer("Conv", &[1, 1, 4, 4], &[1, 1, kernel, kernel], quantize);
    complaints.attributes(convolution(5), "Conv", &[]);
    complaints.attributes(convolution(8), "Conv", &[("pads", vec![1; 4])]);
    complaints.attributes(convolution(3), "Conv", &[("dilations", vec![2, 2])]);
    complaints.attributes(convolution(5), "Conv", &[("strides", vec![2, 2])]);
    complaints.attributes(|quantize| layer("Conv", &[1, 1, 4, 4, 4], &[1, 1, 1, 5, 1], quantize), "Conv", &[]);
    for operator in ["MaxPool", "AveragePool"] {
        let model = |quantize| pool(operator, &[1, 1, 4, 4], quantize);
        complaints.attributes(model, operator, &[("kernel_shape", vec![5, 5])]);
        complaints.attributes(model, operator, &[("kernel_shape", vec![9, 1]), ("pads", vec![2, 0, 2, 0])]);
        complaints.attributes(model, operator, &[("kernel_shape", vec![0, 0])]);
        complaints.attributes(model, operator, &[("kernel_shape", vec![1])]);
    }
    complaints.none();
}

#[test]
fn weights_without_an_extent_or_of_another_rank_are_refused_by_name() {
    let mut complaints = Complaints::default();
    for weights in [&[0i64, 1, 1, 1][..], &[1, 0, 1, 1], &[1, 1, 0, 1], &[1, 1, 1, 0], &[1, 1, 1], &[1, 2, 1, 1], &[1], &[]] {
        for operator in ["Conv", "ConvTranspose"] {
            if operator == "ConvTranspose" && weights == [1, 2, 1, 1] {
                continue;
            }
            complaints.attributes(|quantize| layer(operator, &[1, 1, 4, 4], weights, quantize), operator, &[]);
        }
    }
    for weights in [&[0i64, 4][..], &[4, 0], &[3, 4], &[]] {
        complaints.attributes(|quantize| layer("Gemm", &[1, 4], weights, quantize), "Gemm", &[]);
        complaints.attributes(|quantize| layer("MatMul", &[1, 4], weights, quantize), "MatMul", &[]);
    }
    for at in [0, 1, 2] {
        let mut model = quantized(&[1, 1, 4, 4], 0.5);
        let graph = model.graph.as_mut().unwrap();
        (graph.initializer[at].dims, graph.initializer[at].float_data) = (vec![0], vec![]);
        complaints.refused("an empty scale", &model, "Linear");
    }
    complaints.none();
}

#[test]
fn resizing_by_what_is_no_factor_is_refused_by_name() {
    let mut complaints = Complaints::default();
    let list = |name: &str, values: &[f32]| tensor(name, &[values.len() as i64], values.to_vec());
    let resized = |operator: &str, quantize: bool, inputs: &[&str], constant: TensorProto| {
        let mut model = pool(operator, &[1, 1, 4, 4], quantize);
        let graph = model.graph.as_mut().unwrap();
        let node = graph.node.iter_mut().find(|node| node.op_type == operator).unwrap();
        node.input.extend(inputs.iter().map(|name| (*name).to_owned()));
        graph.initializer.push(constant);
        model.opset_import[0].version = if operator == "Upsample" { 9 } else { 13 };
        model
    };
    for quantize in [true, false] {
        for bad in [0.0, -1.0, -2.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-30, 1e9, f32::MAX] {
            for scales in [[1.0, 1.0, bad, 2.0], [1.0, 1.0, 2.0, bad], [bad, 1.0, 2.0, 2.0], [1.0, bad, 2.0, 2.0]] {
                complaints.refused(&format!("{scales:?}, {quantize}"), &resized("Resize", quantize, &["", "scales"], list("scales", &scales)), "the Resize");
                complaints.refused(&format!("{scales:?}, {quantize}"), &resized("Upsample", quantize, &["scales"], list("scales", &scales)), "the Upsample");
            }
        }
        for bad in [0, -1, i64::MIN, i64::MAX, 1 << 31, 1 << 62] {
            complaints.refused(&format!("{bad}, {quantize}"), &resized("Resize", quantize, &["", "", "sizes"], lengths("sizes", &[1, 1, bad, 8])), "the Resize");
        }
        for values in [&[2.0, 2.0][..], &[1.0; 5], &[2.0]] {
            complaints.refused(&format!("{values:?}, {quantize}"), &resized("Resize", quantize, &["", "scales"], list("scales", values)), "the Resize");
        }
        complaints.refused(&format!("no size, {quantize}"), &resized("Resize", quantize, &[], lengths("sizes", &[1])), "the Resize");
    }
    complaints.none();
}

#[test]
fn windows_of_absurd_extent_are_refused_by_name() {
    let mut complaints = Complaints::default();
    let transposed = |quantize| layer("ConvTranspose", &[1, 1, 4, 4], &[1, 1, 2, 2], quantize);
    let convolution = |quantize| layer("Conv", &[1, 1, 4, 4], &[1, 1, 2, 2], quantize);
    for huge in [1 << 31, 1 << 62, i64::MAX, i64::MIN, -1, 1 << 13] {
        for name in ["strides", "dilations", "output_padding", "output_shape"] {
            complaints.attributes(transposed, "ConvTranspose", &[(name, vec![huge, 1])]);
        }
        complaints.attributes(transposed, "ConvTranspose", &[("pads", vec![0, huge, 0, 0])]);
        for name in ["strides", "dilations"] {
            complaints.attributes(convolution, "Conv", &[(name, vec![1, huge])]);
        }
        for operator in ["MaxPool", "AveragePool"] {
            let model = |quantize| pool(operator, &[1, 1, 4, 4], quantize);
            complaints.attributes(model, operator, &[("kernel_shape", vec![2, huge])]);
            complaints.attributes(model, operator, &[("kernel_shape", vec![2, 2]), ("strides", vec![huge, 1])]);
        }
    }
    for group in [0, -1, 3, 1 << 31, i64::MIN] {
        complaints.attributes(transposed, "ConvTranspose", &[("group", vec![group])]);
        complaints.attributes(convolution, "Conv", &[("group", vec![group])]);
    }
    for zero in ["strides", "dilations"] {
        complaints.attributes(transposed, "ConvTranspose", &[(zero, vec![0, 1])]);
        complaints.attributes(convolution, "Conv", &[(zero, vec![0, 1])]);
    }
    // Each number is modest, what they make together is not.
    let wide = |quantize| layer("ConvTranspose", &[1, 1, 500, 500], &[1, 1, 2, 2], quantize);
    complaints.attributes(wide, "ConvTranspose", &[("strides", vec![4000, 4000])]);
    complaints.none();
}

#[test]
fn constants_that_would_make_large_ones_are_refused_before_they_do() {
    let mut complaints = Complaints::default();
    let model = |operator: &str| {
        let line = |name: &str, dims: &[i64]| tensor(name, dims, vec![1.0; 1 << 17]);
        let nodes = vec![node(operator, &["a", "b"], "c"), node("ReduceMax", &["c"], "d"), node("Add", &["x", "d"], "y")];
        network(&[1, 1], nodes, vec![line("a", &[1 << 17, 1]), line("b", &[1, 1 << 17])])
    };
    for operator in ["Add", "Mul", "MatMul", "Gemm", "Equal", "Pow"] {
        complaints.refused(operator, &model(operator), &format!("the {operator}"));
    }
    complaints.none();
}

/// Integers as a constant of the file.
fn lengths(name: &str, values: &[i64]) -> TensorProto {
    TensorProto { name: name.into(), dims: vec![values.len() as i64], data_type: 7, int64_data: values.to_vec(), ..Default::default() }
}

#[test]
fn borders_whose_sizes_are_a_little_program_are_planned_as_if_the_file_stated_them() {
    // As torch.onnx writes a border of one row above and two columns on the right, with its value in a list of one.
    let nodes = vec![
        node("ConstantOfShape", &["four"], "zeros"),
        node("Concat", &["given", "zeros"], "eight"),
        node("Reshape", &["eight", "pairs"], "rows"),
        node("Slice", &["rows", "last", "first", "zero", "last"], "turned"),
        node("Transpose", &["turned"], "columns"),
        node("Reshape", &["columns", "last"], "flat"),
        node("Cast", &["flat"], "pads"),
        node("Pad", &["x", "pads", "value"], "y"),
    ];
    let constants = vec![
        lengths("four", &[4]),
        lengths("given", &[0, 2, 1, 0]),
        lengths("pairs", &[-1, 2]),
        lengths("last", &[-1]),
        lengths("first", &[i64::MIN + 1]),
        lengths("zero", &[0]),
        tensor("value", &[1], vec![9.0]),
    ];
    let mut model = network(&[1, 1, 1, 2], nodes, constants);
    with(&mut model, 0, AttributeProto { name: "value".into(), r#type: 4, t: Some(lengths("", &[0])), ..Default::default() });
    with(&mut model, 1, AttributeProto { name: "axis".into(), r#type: 2, i: 0, ..Default::default() });
    with(&mut model, 4, ints("perm", vec![1, 0]));
    with(&mut model, 6, AttributeProto { name: "to".into(), r#type: 2, i: 7, ..Default::default() });
    let network = load(&model).unwrap();
    let x = ArrayD::from_shape_vec(IxDyn(&[1, 1, 1, 2]), vec![1.0, 2.0]).unwrap();
    let y = network.session().unwrap().run(&Pool::new(1), &[x.view()]).unwrap();
    assert_eq!(y[0].shape(), [1, 1, 2, 4]);
    assert_eq!(y[0].as_slice().unwrap(), [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 9.0, 9.0]);
}

#[test]
fn sizes_taken_from_another_tensor_of_the_network_are_known_when_it_is_planned() {
    // As torch.onnx writes an enlargement to the size of a skip connection.
    let nodes = vec![
        node("MaxPool", &["x"], "half"),
        node("Relu", &["x"], "skip"),
        node("Shape", &["skip"], "whole"),
        node("Slice", &["whole", "two", "four"], "extent"),
        node("Shape", &["half"], "part"),
        node("Slice", &["part", "zero", "two"], "channels"),
        node("Concat", &["channels", "extent"], "sizes"),
        node("Resize", &["half", "", "", "sizes"], "y"),
    ];
    let constants = vec![lengths("zero", &[0]), lengths("two", &[2]), lengths("four", &[4])];
    let mut model = network(&[1, 1, 2, 6], nodes, constants);
    with(&mut model, 0, ints("kernel_shape", vec![2, 2]));
    with(&mut model, 0, ints("strides", vec![2, 2]));
    with(&mut model, 6, AttributeProto { name: "axis".into(), r#type: 2, i: 0, ..Default::default() });
    for (name, text) in [("mode", "nearest"), ("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")] {
        with(&mut model, 7, AttributeProto { name: name.into(), r#type: 3, s: text.into(), ..Default::default() });
    }
    let network = load(&model).unwrap();
    let x = ArrayD::from_shape_vec(IxDyn(&[1, 1, 2, 6]), (0..12).map(|n| n as f32).collect()).unwrap();
    let y = network.session().unwrap().run(&Pool::new(1), &[x.view()]).unwrap();
    assert_eq!(y[0].as_slice().unwrap(), [7.0, 7.0, 9.0, 9.0, 11.0, 11.0, 7.0, 7.0, 9.0, 9.0, 11.0, 11.0]);
}
