//! `mmgp-gpu-bench`: how near streaming comes to what card and link allow, on a transformer of
//! FLUX.1-dev's shape.
//!
//! A row names a form of the weights, a budget, a number of tokens and a limit on the link. Its steps
//! alternate with those of a model that has all its weights on the card, in one process; each output is
//! compared with that model's, bit by bit. `cargo xtask bench --gpu` builds and runs this, and
//! `cargo xtask bundle` packs it. With `--alone` and `--peers` it is a part of the comparison with other
//! systems that `benches/peers/compare.py` runs. Without a GPU it runs on the host, at a size that a test can bear.
#![forbid(unsafe_code)]

mod adapters;
mod card;
mod chart;
mod files;
mod measure;
mod peers;
mod results;
mod row;
mod rows;
mod single;
mod vae;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use mmgp_models::flux::FluxConfig;
use mmgp_residency::{Budget, Bytes};
use mmgp_synth::Depth;

use crate::{
    adapters::Loras,
    files::Files,
    measure::{Alone, Session, system, told, workload},
    results::{Copies, Failed, Results},
    row::Row,
    rows::{Form, Request, Set, Way, combined, with_quantized_activations},
};

/// Steps of a FLUX.1-dev transformer under several budgets, against bound and schedule
#[derive(Parser)]
#[command(name = "mmgp-gpu-bench", version)]
struct Cli {
    /// About a minute of it
    #[arg(long, conflicts_with = "all")]
    quick: bool,
    /// Every combination
    #[arg(long)]
    all: bool,
    /// Rows of these budgets instead, such as `min`, `4GB`, `50%`, `unlimited`
    #[arg(long, value_delimiter = ',', value_parser = budget, conflicts_with_all = ["quick", "all"])]
    budgets: Vec<Budget>,
    /// With --budgets: tokens of the picture
    #[arg(long, value_delimiter = ',', default_value = "1024", requires = "budgets")]
    image: Vec<usize>,
    /// With --budgets: limits on the link in bytes per second, such as `12GB`, or `none`
    #[arg(long, value_delimiter = ',', default_value = "none", requires = "budgets")]
    links: Vec<Link>,
    /// With --budgets: through page-locked memory, the ring, or both
    #[arg(long, value_enum, value_delimiter = ',', default_value = "pinned", requires = "budgets")]
    ways: Vec<Way>,
    /// Only rows of these forms; w8a8, rotated and fp8 have those of int8, and are measured only if they are named
    #[arg(long, value_enum, value_delimiter = ',')]
    forms: Vec<Form>,
    /// With --budgets: so many random LoRAs of one rank on all layers of attention and feed-forward, such as 8x64
    #[arg(long, value_name = "COUNTxRANK", requires = "budgets")]
    loras: Option<Loras>,
    /// Tokens of the text
    #[arg(long, default_value_t = 512)]
    text: usize,
    /// Double and single blocks
    #[arg(long, value_name = "DOUBLE+SINGLE", default_value = "19+38", value_parser = both)]
    depth: (usize, usize),
    /// Heads of 128 values, which make the width
    #[arg(long, default_value_t = 24)]
    heads: usize,
    /// `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = if cfg!(feature = "cuda") { "cuda" } else { "cpu" })]
    device: Place,
    /// Where the model's files are kept, instead of /dev/shm or else the folder of temporary files
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where gpu.json, gpu.md and gpu.svg go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// No row is begun after so many minutes
    #[arg(long)]
    minutes: Option<f64>,
    /// Keep the rows that an earlier run of the same commit left in --out, and measure the others
    #[arg(long)]
    resume: bool,
    /// Instead, one row of --budgets in which nothing else is on the card, as JSON in this file
    #[arg(long, value_name = "FILE", requires = "budgets", conflicts_with = "resume")]
    alone: Option<PathBuf>,
    /// Instead, what decoding a picture of --pixels takes, as JSON in this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "all", "budgets", "resume"])]
    vae: Option<PathBuf>,
    /// With --vae: the picture's width and height
    #[arg(long, default_value_t = 1024, requires = "vae")]
    pixels: usize,
    /// Instead, a table and a picture of what benches/peers/compare.py left in this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "all", "budgets", "resume"])]
    peers: Option<PathBuf>,
    /// The commit that this was built from, for the header; MMGP_COMMIT by default
    #[arg(long)]
    commit: Option<String>,
}

/// A GPU by its number, or the host.
#[derive(Clone, Copy)]
struct Place(Option<usize>);

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self(None)),
            ("cuda", _) => Ok(Self(Some(0))),
            (_, Some(Ok(ordinal))) => Ok(Self(Some(ordinal))),
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}

/// A limit on the link, or none.
#[derive(Clone, Copy)]
struct Link(Option<Bytes>);

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, Bytes::parse(text)) {
            ("none", _) => Ok(Self(None)),
            (_, Some(bytes)) if bytes.0 > 0 => Ok(Self(Some(bytes))),
            _ => Err("expected bytes per second such as 12GB, or none".into()),
        }
    }
}

fn budget(text: &str) -> Result<Budget, String> {
    text.parse().map_err(|error: mmgp_residency::Error| error.to_string())
}

fn both(text: &str) -> Result<(usize, usize), String> {
    text.parse::<Depth>()?.both()
}

impl Cli {
    /// The rows asked for.
    fn requests(&self) -> Vec<Request> {
        let forms = match self.forms.as_slice() {
            [] => &[Form::Bf16, Form::Int8],
            forms => forms,
        };
        if !self.budgets.is_empty() {
            let links: Vec<Option<Bytes>> = self.links.iter().map(|link| link.0).collect();
            let rows = combined(forms, &self.ways, &self.budgets, &self.image, &links);
            return rows.into_iter().map(|row| Request { loras: self.loras, ..row }).collect();
        }
        let set = match (self.quick, self.all) {
            (true, _) => Set::Quick,
            (_, true) => Set::All,
            _ => Set::Table,
        };
        with_quantized_activations(set.requests())
            .into_iter()
            .filter(|row| forms.contains(&row.form))
            .collect()
    }

    fn config(&self) -> Result<FluxConfig> {
        let mut config = FluxConfig::default();
        config.guidance_embeds = true;
        (config.num_layers, config.num_single_layers) = self.depth;
        config.num_attention_heads = self.heads;
        config.validate()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
    let done = match &cli {
        Cli { peers: Some(lines), .. } => peers::write(lines, &cli.out).map(|()| true),
        Cli { alone: Some(to), .. } => alone(&cli, to).map(|()| true),
        Cli { vae: Some(to), .. } => vae(&cli, to).map(|()| true),
        _ => run(&cli),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures the one row that is asked for, in a process of its own.
fn alone(cli: &Cli, to: &Path) -> Result<()> {
    let requests = cli.requests();
    let [request] = requests.as_slice() else {
        bail!("--alone takes one row: one each of --forms, --budgets, --image, --links and --ways");
    };
    let config = cli.config()?;
    let files = Files::new(cli.dir.as_deref(), &config)?;
    let row = single::measure(&files, &config, cli.device.0, request, cli.text)?;
    let text = serde_json::to_string(&row)?;
    fs::write(to, text).with_context(|| format!("{}", to.display()))
}

/// Measures a decode, in a process of its own.
fn vae(cli: &Cli, to: &Path) -> Result<()> {
    let files = Files::new(cli.dir.as_deref(), &cli.config()?)?;
    vae::write(&files, cli.device.0, cli.pixels, to)
}

/// Measures the rows; whether all could be and had the resident run's bytes.
fn run(cli: &Cli) -> Result<bool> {
    let begun = Instant::now();
    let config = cli.config()?;
    let mut requests = cli.requests();
    ensure!(!requests.is_empty(), "no rows of these forms");
    fs::create_dir_all(&cli.out).with_context(|| format!("{}", cli.out.display()))?;
    let commit = cli.commit.clone().or_else(|| env::var("MMGP_COMMIT").ok());
    let mut results = Results::new(String::new(), card::driver(), commit);
    if cli.resume
        && let Some(earlier) = Results::read(&cli.out)?
    {
        ensure!(
            earlier.commit == results.commit,
            "{} holds rows of another commit",
            cli.out.display()
        );
        requests
            .retain(|request| !earlier.rows.iter().any(|row| is_of(row, request, cli, &config)));
        results = Results { failed: Vec::new(), ..earlier };
    }

    if !cli.resume {
        results::forget_passes(&cli.out)?;
    }
    let files = Files::new(cli.dir.as_deref(), &config)?;
    let late = || cli.minutes.is_some_and(|m| begun.elapsed().as_secs_f64() >= m * 60.);
    let all = requests.len();
    let mut at = 0;
    for rows in requests.chunk_by(|a, b| (a.form, a.way, a.loras) == (b.form, b.way, b.loras)) {
        if late() {
            break;
        }
        let mut session = Session::open(&files, &config, cli.device.0, &rows[0], cli.text)?;
        results.card = session.device();
        for request in rows {
            if late() {
                break;
            }
            at += 1;
            let name = told(request, cli.text);
            eprintln!("[{:>4.0} s] {at}/{all}: {name}", begun.elapsed().as_secs_f64());
            match measured(&mut session, request, wants_copies(request, &requests)) {
                Ok((row, copies)) => {
                    tell(&row);
                    if let Some(copies) = copies {
                        eprintln!("    copies alone {:.1} GB/s", copies.gb_s);
                        results.copies_alone.push(copies);
                    }
                    results::record(&cli.out, &row)?;
                    results.rows.push(row);
                }
                Err(error) => {
                    eprintln!("    failed: {error:#}");
                    results.failed.push(Failed { row: name, error: format!("{error:#}") });
                }
            }
            results.write(&cli.out)?;
        }
    }
    if at < all {
        eprintln!("{} rows were not begun: time was over", all - at);
    }
    results.write(&cli.out)?;
    println!("{}", results.table());
    eprintln!("{}/gpu.json, gpu.md and gpu.svg", cli.out.display());
    eprintln!("the model's files stay in {}", files.dir().display());
    Ok(results.failed.is_empty() && results.rows.iter().all(|row| row.same_bytes))
}

/// A row, or the median of three if the first is over its bar.
fn measured(
    session: &mut Session<'_>,
    request: &Request,
    alone: Alone,
) -> Result<(Row, Option<Copies>)> {
    let (first, copies) = session.row(request, alone)?;
    if !first.over_its_bar() {
        return Ok((first, copies));
    }
    tell(&first);
    eprintln!("    over its bar: twice more");
    let mut all = vec![first];
    for _ in 0..2 {
        all.push(session.row(request, Alone::Leave)?.0);
    }
    Ok((Row::median(all).context("three rows have a median")?, copies))
}

/// Whether copies alone are measured too: through the ring, and, to compare with, the same pinned.
fn wants_copies(request: &Request, all: &[Request]) -> Alone {
    let same = |other: &Request| {
        other.way == Way::Ring && Request { way: request.way, ..*other } == *request
    };
    if all.iter().any(same) { Alone::Measure } else { Alone::Leave }
}

/// Whether `row` is what `request` asks for.
fn is_of(row: &Row, request: &Request, cli: &Cli, config: &FluxConfig) -> bool {
    let budget = match request.budget {
        Budget::Bytes(bytes) => Some(bytes.0),
        Budget::Unlimited => None,
        // Only known once it is planned.
        _ => return false,
    };
    (row.form, row.tokens, row.budget_bytes) == (request.form, request.image + cli.text, budget)
        && row.system == system(request)
        && row.workload == workload(config)
}

fn tell(row: &Row) {
    let took = |seconds: f64| Duration::from_secs_f64(seconds);
    eprintln!(
        "    step {:.4?} = {:.3} x bound, {} x schedule; resident {:.4?}{}",
        took(row.step_s),
        row.ratio,
        row.schedule_ratio.map_or("-".into(), |ratio| format!("{ratio:.3}")),
        took(row.resident_s),
        if row.same_bytes { "" } else { "; OTHER BYTES" },
    );
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn cli(args: &str) -> Cli {
        Cli::try_parse_from(["bench"].into_iter().chain(args.split_whitespace())).unwrap()
    }

    #[test]
    fn options_choose_the_rows() {
        Cli::command().debug_assert();
        assert_eq!(cli("").requests(), Set::Table.requests());
        assert_eq!(cli("--all").requests(), Set::All.requests());
        let int8 = cli("--quick --forms int8").requests();
        assert!(int8.len() == 2 && int8.iter().all(|row| row.form == Form::Int8));
        let w8a8 = cli("--quick --forms w8a8").requests();
        assert!(w8a8.len() == 2 && w8a8.iter().all(|row| row.form == Form::W8a8));
        let fp8 = cli("--quick --forms fp8").requests();
        assert!(fp8.len() == 2 && fp8.iter().all(|row| row.form == Form::Fp8));
        let adapted = cli("--budgets 4GB --loras 8x64").requests();
        let loras = Some(Loras { count: 8, rank: 64 });
        assert!(adapted.len() == 2 && adapted.iter().all(|row| row.loras == loras));
        let own = "--budgets 50%,4GB --image 64,16 --links none,12GB --forms bf16";
        assert_eq!(cli(&format!("{own} --ways ring,pinned")).requests().len(), 16);
        let own = cli(own).requests();
        assert!(own.len() == 8 && own.iter().all(|row| row.way == Way::Pinned));
        assert_eq!((own[0].image, own[7].image), (16, 64));
        for wrong in [
            "--budgets some",
            "--links 0",
            "--image 5",
            "--depth 3",
            "--quick --all",
            "--alone x",
            "--peers x --quick",
            "--vae x --budgets 4GB",
            "--pixels 8",
            "--loras 8x64",
        ] {
            let args = ["bench"].into_iter().chain(wrong.split_whitespace());
            assert!(Cli::try_parse_from(args).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rows_of_an_earlier_run_are_known_again() {
        let cli = cli("--quick");
        let config = cli.config().unwrap();
        let row = row::tests::row(Some(4.), 0.4);
        let of = |row: &Row| {
            let requests = cli.requests();
            let found = requests.iter().filter(|request| is_of(row, request, &cli, &config));
            found.map(|request| (request.form, request.way)).collect::<Vec<_>>()
        };
        assert_eq!(of(&row), [(Form::Bf16, Way::Pinned)]);
        assert_eq!(
            of(&Row { system: "mmgp, ring".into(), ..row.clone() }),
            [(Form::Bf16, Way::Ring)]
        );
        assert_eq!(of(&Row { form: Form::Int8, ..row.clone() }), [(Form::Int8, Way::Pinned)]);
        assert_eq!(of(&Row { tokens: 4608, ..row.clone() }), []);
        assert_eq!(of(&Row { workload: "FLUX 3+5 of width 3072".into(), ..row }), []);
    }

    #[test]
    fn what_comes_through_the_ring_is_compared_with_the_same_pinned() {
        let all = Set::Table.requests();
        let copied: Vec<String> = all
            .iter()
            .filter(|row| wants_copies(row, &all) == Alone::Measure)
            .map(system)
            .collect();
        let expected =
            ["mmgp", "mmgp, link at 20 GB/s", "mmgp, ring", "mmgp, ring, link at 20 GB/s"];
        assert_eq!(copied, expected);
    }
}
