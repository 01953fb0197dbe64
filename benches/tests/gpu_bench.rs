//! The GPU's bench on the host, at a size that takes a second: every row is measured, compared and written.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn bench(dir: &Path, options: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmgp-gpu-bench"));
    command.args(["--device", "cpu", "--depth", "2+3", "--heads", "1", "--text", "8"]);
    command.arg("--dir").arg(dir.join("files")).arg("--out").arg(dir);
    command.env_remove("MMGP_COMMIT").args(options.split_whitespace()).output().unwrap()
}

fn json(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("gpu.json")).unwrap()).unwrap()
}

#[test]
fn rows_are_measured_compared_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let options = "--budgets min,85%,unlimited --image 16,12 --commit 0123456";
    let run = bench(dir.path(), options);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");

    let results = json(dir.path());
    assert_eq!((&results["card"], &results["commit"]), (&"host".into(), &"0123456".into()));
    assert_eq!(results["failed"], Value::Array(Vec::new()));
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 3);
    for row in rows {
        assert_eq!(row["same_bytes"], true, "{row}");
        let seconds = |key: &str| row[key].as_f64().unwrap();
        assert!(seconds("step_s") > 0. && seconds("resident_s") > 0.);
        assert!(seconds("bound_s") >= seconds("resident_s"));
        assert!((seconds("ratio") * seconds("bound_s") / seconds("step_s") - 1.).abs() < 1e-9);
        let resident = row["resident_blocks"].as_u64().unwrap();
        let streamed = row["streamed_bytes"].as_u64().unwrap();
        match row["budget_bytes"].as_u64() {
            None => assert_eq!((resident, streamed), (5, 0), "{row}"),
            Some(_) => assert!(resident < 5 && streamed > 0, "{row}"),
        }
    }
    let table = fs::read_to_string(dir.path().join("gpu.md")).unwrap();
    assert_eq!(table.matches("| mmgp |").count(), rows.len());
    let picture = fs::read_to_string(dir.path().join("gpu.svg")).unwrap();
    assert!(picture.contains("20 tokens") && picture.ends_with("</svg>\n"));

    // What is there is kept: only rows without a known budget are measured again.
    let run = bench(dir.path(), &format!("{options} --resume --forms int8"));
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success() && said.contains("1/4") && !said.contains("unlimited"), "{said}");
    assert_eq!(json(dir.path())["rows"].as_array().unwrap().len(), rows.len() + 4);
    let other = bench(dir.path(), "--budgets min --resume --commit 7654321");
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(!other.status.success() && said.contains("another commit"), "{said}");
}

#[test]
fn a_row_that_cannot_be_measured_is_told_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let run = bench(dir.path(), "--budgets 1kB,unlimited --image 4 --forms bf16");
    assert!(!run.status.success());
    let results = json(dir.path());
    assert_eq!(results["rows"].as_array().unwrap().len(), 1);
    assert!(results["failed"][0]["error"].as_str().unwrap().contains("1.0 kB"), "{results}");
}

#[test]
fn no_row_is_begun_when_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let run = bench(dir.path(), "--budgets min --image 4 --minutes 0");
    assert!(run.status.success());
    assert_eq!(json(dir.path())["rows"], Value::Array(Vec::new()));
    assert!(!dir.path().join("files").join("flux-2+3-128-bf16.safetensors").exists());
}
