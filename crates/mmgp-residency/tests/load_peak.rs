//! Contract 2: a bf16 checkpoint that becomes int8 while it is read needs the memory of its int8 form
//! and a window beside it, never that of what lies in the file. Seen from outside: the test starts
//! itself as a child and samples the anonymous memory that the system counts for it.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap, fs, path::Path, process::Command, sync::Arc, thread::sleep,
    time::Duration,
};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, QuantPolicy};
use mmgp_residency::{Budget, ModelBuilder, Pager};

const WIDTH: usize = 4096;
const DEPTH: usize = 60;
const WINDOW: u64 = 256_000_000;
const CHILD: &str = "MMGP_LOAD_PEAK_OF";

#[test]
fn int8_on_the_fly_needs_the_int8_form_and_a_window() {
    if let Some(path) = std::env::var_os(CHILD) {
        return load(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.safetensors");
    write(&path);
    assert!(fs::metadata(&path).unwrap().len() > 2_000_000_000);

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "int8_on_the_fly_needs_the_int8_form_and_a_window"])
        .env(CHILD, &path)
        .spawn()
        .unwrap();
    let mut peak = 0;
    let status = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => sleep(Duration::from_millis(5)),
        }
    };
    assert!(status.success());
    let int8 = (DEPTH * WIDTH * (WIDTH + 2)) as u64;
    println!("int8 form {int8} bytes, anonymous {peak} bytes at most");
    assert!(peak > int8, "{peak}: nothing was seen");
    assert!(peak <= int8 + WINDOW, "{peak} bytes for {int8} of int8");
}

fn write(path: &Path) {
    let spec = |i| TensorSpec::new(format!("{i}.weight"), Dtype::BF16, [WIDTH, WIDTH]);
    let specs: Vec<_> = (0..DEPTH).map(spec).collect();
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    let values: Vec<u8> = (0..WIDTH * WIDTH)
        .flat_map(|i| bf16::from_f32((i % 251) as f32 / 251. - 0.5).to_le_bytes())
        .collect();
    for spec in &specs {
        writer.write(&spec.name, &values).unwrap();
    }
    writer.finish().unwrap();
}

fn load(path: &Path) {
    let pager = Pager::new(&Device::Cpu).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
    let mut builder = ModelBuilder::new(&pager, "wide", checkpoint);
    builder.quantize(QuantPolicy::default());
    let layers = (0..DEPTH)
        .map(|i| builder.block(&i.to_string()).linear(WIDTH, WIDTH, Bias::No).unwrap())
        .collect();
    let model = builder.finish((), layers).unwrap();
    pager.plan(Budget::Unlimited).unwrap();
    let x = Tensor::ones((1, WIDTH), DType::F32, &Device::Cpu).unwrap();
    let pass = model.pass().unwrap();
    for layer in pass.blocks() {
        let y = layer.unwrap().run(|layer| {
            assert_eq!(layer.format(), "int8");
            layer.forward(&x)
        });
        assert_eq!(y.unwrap().dims(), [1, WIDTH]);
    }
}
