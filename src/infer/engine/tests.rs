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
        name: format!("the {operator}"),
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
    onnx::check(model)?;
    guarded(|| Network::plan(model, Some(Kernel::best())), EngineError::Load)
}

/// The network is refused, and the sentence names the culprit.
fn check_refused(model: &ModelProto, names: &str) {
    match load(model) {
        Err(EngineError::Load(text)) => assert!(text.contains(names), "{text:?} does not name {names:?}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was accepted, though {names:?} is wrong"),
    }
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
    let dynamic = network(&[4], vec![node("Shape", &["x"], "s"), node("ConstantOfShape", &["s"], "y")], vec![]);
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
fn a_float_convolution_with_its_relu_runs_in_our_kernel_to_the_bits_of_its_definition() {
    let mut model = network(
        &[1, 1, 1, 3],
        vec![node("Conv", &["x", "w", "b"], "c"), node("Relu", &["c"], "y")],
        vec![tensor("w", &[2, 1, 1, 1], vec![2.0, -1.0]), tensor("b", &[2], vec![0.5, 0.25])],
    );
    model.graph.as_mut().unwrap().node[0].attribute.push(ints("kernel_shape", vec![1, 1]));
    let network = load(&model).unwrap();
    assert_eq!(network.explain().iter().filter(|step| step.place == "float").count(), 1);
    let x = ArrayD::from_shape_vec(IxDyn(&[1, 1, 1, 3]), vec![1.0, -1.0, 0.0]).unwrap();
    let y = network.session().unwrap().run(&Pool::new(2), &[x.view()]).unwrap();
    assert_eq!(y[0].shape(), [1, 2, 1, 3]);
    assert_eq!(y[0].as_slice().unwrap(), [2.5, 0.0, 0.5, 0.0, 1.25, 0.25]);
}
