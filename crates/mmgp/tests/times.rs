//! What passes cost, kept by one start for the next: read before the first plan, for the same machine, model, shape
//! and recipe alone, and never of influence on a picture.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use mmgp::{AdapterArg, Budget, Offload, Pipeline, Plan, Request, Settings, Store, Unfit};
use mmgp_residency::PassCosts;
use serde_json::{Value, json};

mod common;
use common::{copy_of_demo, demo, edit, mmgp};

const MODEL: &str = "transformer";
/// Bytes a second of the link in notes that a test made up.
const LINK: f64 = 3.5e5;

/// A start with a store in `store`.
fn start(store: &Path, settings: Settings) -> (Offload, Box<dyn Pipeline>) {
    start_with(&demo(), store, settings)
}

fn start_with(dir: &Path, store: &Path, settings: Settings) -> (Offload, Box<dyn Pipeline>) {
    let builder = Offload::builder().device(mmgp::DeviceChoice::Cpu).settings(settings);
    let builder = builder.budget(Budget::Percent(40.)).store(Store::at(store), |_| ());
    let mut offload = builder.build().unwrap();
    let pipeline = offload.pipeline(dir).unwrap();
    (offload, pipeline)
}

fn request(pipeline: &dyn Pipeline) -> Request {
    Request { steps: 4, ..pipeline.defaults().request("red heart") }
}

fn expected(offload: &Offload, pipeline: &dyn Pipeline, request: &Request) -> Option<PassCosts> {
    offload.plan_for(pipeline, request).unwrap();
    offload.pager().expected_costs(MODEL)
}

/// Draws within the plan that there is, or one for the request.
fn draw(offload: &Offload, pipeline: &mut dyn Pipeline, request: &Request) -> Vec<u32> {
    if offload.pager().plan_in_force().is_none() {
        offload.plan_for(pipeline, request).unwrap();
    }
    let output = offload.generate(pipeline, request, &mut |_| ()).unwrap();
    output.latents.values.into_iter().map(f32::to_bits).collect()
}

/// The slots of the transformer's blocks.
fn slots(plan: &Plan) -> Vec<usize> {
    plan.models.iter().find(|m| m.name == MODEL).unwrap().slot_of.clone()
}

fn notes(store: &Path) -> Vec<PathBuf> {
    let mut notes: Vec<_> = fs::read_dir(store.join("times"))
        .into_iter()
        .flatten()
        .map(|f| f.unwrap().path())
        .collect();
    notes.sort();
    notes
}

/// The one note, and a way to change it.
fn change(store: &Path, change: impl FnOnce(&mut Value)) {
    let [note] = &notes(store)[..] else { panic!("{:?}", notes(store)) };
    let mut value: Value = mmgp_io::read_json(note).unwrap();
    assert_eq!(value["subject"]["model"], MODEL);
    change(&mut value);
    fs::write(note, value.to_string()).unwrap();
}

/// Costs with which no even spread is best: little computing before much, a link that is as busy. No machine is so
/// slow that it would measure them.
fn uneven(note: &mut Value) {
    let blocks = note["says"]["blocks"].as_array().unwrap().len();
    let seconds = (0..blocks).map(|i| if i < blocks / 2 { 1. } else { 7. });
    note["says"] = json!({ "blocks": seconds.collect::<Vec<_>>(), "outside": 1., "link": LINK });
}

#[test]
fn the_second_start_plans_with_what_the_first_one_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (first, mut pipeline) = start(dir.path(), Settings::default());
    let request = request(&*pipeline);
    assert_eq!(expected(&first, &*pipeline, &request), None);
    let spread = slots(&first.plan_for(&*pipeline, &request).unwrap());
    assert!(notes(dir.path()).is_empty());
    let latents = draw(&first, &mut *pipeline, &request);
    let measured = first.pager().measured_costs(MODEL).unwrap();

    let (second, mut pipeline) = start(dir.path(), Settings::default());
    let kept = expected(&second, &*pipeline, &request).unwrap();
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b;
    assert_eq!(kept.blocks.len(), measured.blocks.len());
    assert!(kept.blocks.iter().zip(&measured.blocks).all(|(&a, &b)| close(a, b)), "{kept:?}");
    // A fetch ahead may have ended since.
    assert!((0.5..2.).contains(&(kept.link / measured.link)), "{kept:?}");
    assert_eq!(draw(&second, &mut *pipeline, &request), latents);

    // Costs that ask for another plan get it at once, and the same picture.
    change(dir.path(), uneven);
    let (third, mut pipeline) = start(dir.path(), Settings::default());
    let plan = third.plan_for(&*pipeline, &request).unwrap();
    assert_ne!(slots(&plan), spread);
    assert_eq!(third.pager().plan_in_force().unwrap(), plan);
    assert_eq!(draw(&third, &mut *pipeline, &request), latents);
    // As far off as they are, what was measured takes their place.
    change(dir.path(), |note| assert_ne!(note["says"]["link"], LINK));

    // Who makes the plan without a request has it changed before the first pass.
    change(dir.path(), uneven);
    let (fourth, mut pipeline) = start(dir.path(), Settings::default());
    assert_eq!(slots(&fourth.plan().unwrap()), spread);
    let one = Request { steps: 1, ..request };
    draw(&fourth, &mut *pipeline, &one);
    assert_eq!(slots(&fourth.pager().plan_in_force().unwrap()), slots(&plan));
    // One pass measures nothing.
    change(dir.path(), |note| assert_eq!(note["says"]["link"], LINK));
}

#[test]
fn a_note_is_for_one_machine_model_shape_and_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let (offload, mut pipeline) = start(&store, Settings::default());
    let one = request(&*pipeline);
    draw(&offload, &mut *pipeline, &one);

    let (mut offload, mut pipeline) = start(&store, Settings::default());
    let known = |offload: &Offload, pipeline: &dyn Pipeline, request: &Request| {
        expected(offload, pipeline, request).is_some()
    };
    // What changes no time of a pass.
    let same = Request { steps: 9, seed: 1, guidance: 2., prompt: "rocket".into(), ..one.clone() };
    assert!(known(&offload, &*pipeline, &same));
    for other in [
        Request { width: 2 * one.width, ..one.clone() },
        Request { height: 2 * one.height, ..one.clone() },
        Request { max_sequence_length: one.max_sequence_length / 2, ..one.clone() },
    ] {
        assert!(!known(&offload, &*pipeline, &other), "{other:?}");
        assert!(known(&offload, &*pipeline, &one));
    }
    let lora: AdapterArg =
        format!("{}", demo().join("../tiny-flux-lora/riso.safetensors").display()).parse().unwrap();
    offload.load_loras_into_model(&mut *pipeline, &[lora], Unfit::Fail).unwrap();
    assert!(!known(&offload, &*pipeline, &one), "with an adapter");
    offload.load_loras_into_model(&mut *pipeline, &[], Unfit::Fail).unwrap();
    assert!(known(&offload, &*pipeline, &one));

    drop(pipeline);
    let pipeline = offload.pipeline(demo()).unwrap();
    assert!(known(&offload, &*pipeline, &one), "opened again");

    let mut settings = Settings::default();
    settings.set("async_transfers", "off").unwrap();
    let (offload, pipeline) = start(&store, settings);
    assert!(!known(&offload, &*pipeline, &one), "with other copies");
    let mut settings = Settings::default();
    settings.set("quantize_transformer", "on").unwrap();
    let (offload, pipeline) = start(&store, settings);
    assert!(!known(&offload, &*pipeline, &one), "quantized");
    let root = copy_of_demo(dir.path());
    let (offload, pipeline) = start_with(&root, &store, Settings::default());
    assert!(known(&offload, &*pipeline, &one), "the same model in another folder");
    edit(&root.join("transformer/config.json"), "\"num_layers\": 3", "\"num_layers\": 2");
    let (offload, pipeline) = start_with(&root, &store, Settings::default());
    assert!(!known(&offload, &*pipeline, &one), "another model");

    // Under the right name, but on something else.
    for (key, value) in [
        ("machine", json!("another")),
        ("version", json!("0.0.0")),
        ("compute", json!("BF16")),
        ("pipeline", json!("OtherPipeline")),
    ] {
        let mut before = Value::Null;
        change(&store, |note| {
            before = note.clone();
            note["subject"][key] = value;
        });
        let (offload, pipeline) = start(&store, Settings::default());
        assert!(!known(&offload, &*pipeline, &one), "{key}");
        change(&store, |note| *note = before);
    }
    let (offload, pipeline) = start(&store, Settings::default());
    assert!(known(&offload, &*pipeline, &one));
}

#[test]
fn a_shape_is_measured_on_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (offload, mut pipeline) = start(dir.path(), Settings::default());
    let small = request(&*pipeline);
    draw(&offload, &mut *pipeline, &small);
    assert_eq!(notes(dir.path()).len(), 1);
    let large = Request { steps: 1, width: 2 * small.width, ..small.clone() };
    draw(&offload, &mut *pipeline, &large);
    assert_eq!(offload.pager().measured_costs(MODEL), None, "first visits do not count");
    assert_eq!(notes(dir.path()).len(), 1, "what another shape took is none of its times");
    draw(&offload, &mut *pipeline, &large);
    assert_eq!(notes(dir.path()).len(), 2);
    draw(&offload, &mut *pipeline, &small);
    assert_eq!(notes(dir.path()).len(), 2);
}

#[test]
fn damaged_and_hostile_notes_are_ignored_and_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (offload, mut pipeline) = start(dir.path(), Settings::default());
    let request = request(&*pipeline);
    let spread = slots(&offload.plan_for(&*pipeline, &request).unwrap());
    let latents = draw(&offload, &mut *pipeline, &request);
    let note = notes(dir.path()).remove(0);
    let whole = fs::read_to_string(&note).unwrap();
    let says = |what: &str, value: Value| {
        let mut note: Value = serde_json::from_str(&whole).unwrap();
        uneven(&mut note);
        note["says"][what] = value;
        note.to_string()
    };
    let hostile = [
        String::new(),
        whole[..whole.len() / 2].into(),
        "[".repeat(1000),
        whole.replace("\"link\":", "\"link\":1e999,\"_\":"),
        says("blocks", json!([])),
        says("blocks", json!([1e-3])),
        says("blocks", json!(vec![1e-3; 100_000])),
        says("blocks", json!(vec![0.; 8])),
        says("blocks", json!(vec![-1e-3; 8])),
        says("blocks", json!(vec![1e300; 8])),
        says("blocks", json!("8")),
        says("outside", json!(-1.)),
        says("link", json!(0)),
        says("link", json!(-1e9)),
        says("link", json!(null)),
        says("link", json!(1e300)),
    ];
    for damage in hostile {
        fs::write(&note, &damage).unwrap();
        let said = &damage[..damage.len().min(300)];
        let (offload, pipeline) = start(dir.path(), Settings::default());
        let plan = offload.plan_for(&*pipeline, &request).unwrap();
        assert_eq!(slots(&plan), spread, "{said}");
        assert_eq!(offload.pager().expected_costs(MODEL), None, "{said}");
    }
    fs::write(&note, says("outside", json!(-1.))).unwrap();
    let (offload, mut pipeline) = start(dir.path(), Settings::default());
    assert_eq!(draw(&offload, &mut *pipeline, &request), latents);
    let (offload, pipeline) = start(dir.path(), Settings::default());
    assert!(expected(&offload, &*pipeline, &request).is_some());
}

#[test]
fn the_command_keeps_times_in_its_store_and_clears_them() {
    let dir = tempfile::tempdir().unwrap();
    let generate = |store: &str| {
        let args = ["generate", "red heart", "--steps", "4", "--budget", "40%", "--out", "it.png"];
        let run = mmgp(dir.path(), &[&args[..], &["--device", "cpu", "--store", store]].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run
    };
    let off = generate("off");
    let first = generate("store");
    assert_eq!(first.latents(), off.latents());
    let store = dir.path().join("store");
    let plan = |run: &common::Run| {
        run.stderr.lines().find(|l| l.trim().starts_with(MODEL)).unwrap().to_string()
    };
    change(&store, |note| {
        note["says"]["blocks"] = json!([9., 9., 9., 1., 1., 1., 1., 1.]);
        note["says"]["link"] = json!(3e5);
    });
    let second = generate("store");
    assert_eq!(second.latents(), off.latents());
    assert_ne!(plan(&first), plan(&second), "the plan that is printed is made with what was kept");
    let clear = mmgp(dir.path(), &["store", "clear", "--store", "store"]);
    assert_eq!(clear.code, Some(0), "{}", clear.stderr);
    assert_eq!(fs::read_dir(&store).unwrap().count(), 0);

    // A cache that cannot be written to is no error.
    fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(generate("file/store").latents(), off.latents());
}
