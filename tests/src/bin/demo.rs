//! A guest moves to another host and back, for a person to watch. Started by `tests/demo`.
//!
//! ```text
//!   a lab of two hosts ── a guest that checks its own memory ── there, managed ── back, peer-to-peer
//!                                                                    └── each move is judged by four witnesses:
//!        virsh: its exit status           the guest: every page, and how far its clocks went apart
//!        the engine: its timeline         the switch: the longest silence of the guest's heartbeat
//! ```
//!
//! The lab ends with this process, however that ends (see [`ferry_tests::lab`]).

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::beat::Listener;
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{address, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::wait_for;

/// The guest: small enough for a laptop, busy enough to need rounds.
const NAME: &str = "passenger";
const MEMORY_MIB: u64 = 512;
const FILLED_MIB: u64 = 160;
const WORKING_SET_MIB: u64 = 32;
const WRITES_MIB: u64 = 24;
/// Its number in the guests' network.
const NUMBER: u8 = 1;

/// Heartbeats listened to before a move, one a millisecond, to know how steady they are here.
const BEATS: u64 = 1500;
/// Seconds of the guest's time after which it knows how long it was stopped.
const SETTLED: f64 = 2.5;
/// For one migration.
const MOVE_LIMIT: &str = "60";

fn main() -> Result<()> {
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/demo");
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let out = out.canonicalize().context("target/demo")?;
    let start = Instant::now();

    headline("Two hosts");
    say("Each is a set of namespaces on this machine, with a libvirtd of its own (tests/lab).");
    Lab::with(Options::default(), |lab| show(lab, &out))?;

    say(&format!("That took {:.0} s.", start.elapsed().as_secs_f64()));
    Ok(())
}

fn show(lab: &Lab, out: &Path) -> Result<()> {
    for host in lab.hosts() {
        say(&introduction(host)?);
    }
    let (one, two) = (lab.host(1), lab.host(2));

    headline("A guest");
    let guest = Guest::linux(NAME)
        .memory_mib(MEMORY_MIB)
        .filled(FILLED_MIB)
        .working_set(WORKING_SET_MIB)
        .rate(Rate::mib(WRITES_MIB));
    say(&format!(
        "{NAME}: Linux, {MEMORY_MIB} MiB. It has filled {FILLED_MIB} MiB, and rewrites {WORKING_SET_MIB} MiB more over and \
         over, {WRITES_MIB} MiB/s."
    ));
    say("It knows what each of its pages must hold, and looks. Every millisecond it sends a heartbeat.");
    let scene = Scene::start(lab, one, guest, NUMBER)?;
    let listener = lab.witness()?;
    let mut journey = Journey { scene, listener, out };
    say(&journey.verdict("before")?);

    let there = journey.go(one, two, "managed", &[])?;
    let back = journey.go(two, one, "peer-to-peer", &["--p2p"])?;
    lab.assert_clean(1)?;
    lab.assert_clean(2)?;

    headline("Home again");
    say("The guest never rebooted, no page was lost, and both hosts are as they were.");
    say(&format!("Pictures of the moves: {}", there.display()));
    say(&format!("                       {}", back.display()));
    say("To try things by hand: tests/lab up (see tests/lab --help)");
    Ok(())
}

/// What a host runs.
fn introduction(host: &Host) -> Result<String> {
    let versions = host.virsh(&["version"])?;
    let of = |what: &str| {
        let line = versions.lines().find_map(|line| line.strip_prefix(what));
        line.unwrap_or("?").trim().to_owned()
    };
    Ok(format!(
        "{}  {}  {}, {}, Linux {}, virt-ferry {}",
        host.name(),
        host.address(),
        of("Using library:"),
        of("Running hypervisor:"),
        host.run(&["uname", "--kernel-release"])?,
        env!("CARGO_PKG_VERSION"),
    ))
}

struct Journey<'a> {
    scene: Scene<'a>,
    listener: &'a Listener,
    out: &'a Path,
}

impl Journey<'_> {
    /// Moves the guest and lets the witnesses speak; returns the picture of the move.
    fn go(&mut self, from: &Host, to: &Host, how: &str, options: &[&str]) -> Result<PathBuf> {
        headline(&format!("{} → {}, {how}", from.name(), to.name()));
        let ip = address(NUMBER).ip;
        self.listener.reset();
        let steady = self.listener.wait(ip, BEATS, PATIENCE)?.longest.length;
        self.listener.reset();
        self.scene.remote().order("reset", PATIENCE)?;
        self.listener.wait(ip, 1, PATIENCE)?;

        migrate(from, to, options)?;

        self.scene.lives_on(to)?;
        let timeline = newest_timeline(from)?;
        let picture = self.out.join(format!("{how}.svg"));
        say("");
        say(&report(&timeline, &picture)?);

        let stopped = self.stopped()?;
        let heard = self.listener.heard(ip);
        ensure!(
            heard.repeated == 0,
            "{} heartbeats came twice: the guest ran in two places",
            heard.repeated
        );
        say("");
        say(&format!(
            "The guest says: by its hardware clock it stood still for {stopped:.0} ms."
        ));
        say(&format!(
            "The switch says: its heartbeat was silent for {:.0} ms; before the move, {:.0} ms at most.",
            milliseconds(heard.longest.length),
            milliseconds(steady)
        ));
        say("    (It is emulated, without KVM: at its new place QEMU first translates its code anew.)");
        say(&self.verdict(how)?);
        Ok(picture)
    }

    /// What the guest finds when it looks at all of its memory now.
    fn verdict(&self, id: &str) -> Result<String> {
        let verdict = self.scene.remote().check(id, PATIENCE)?;
        ensure!(
            verdict.ok(),
            "the guest says: {} of my pages are damaged",
            verdict.errors
        );
        Ok(format!(
            "The guest says: I looked at all of my {} pages, written {} times by now, and each is what it must be.",
            verdict.pages, verdict.seq
        ))
    }

    /// How long the guest's own clock stood still, in ms: waits until the guest can know.
    fn stopped(&self) -> Result<f64> {
        let remote = self.scene.remote();
        let arrived = remote.status(PATIENCE)?.t;
        wait_for("the guest to compare its clocks", PATIENCE, || {
            let status = remote.status(PATIENCE)?;
            Ok((status.t >= arrived + SETTLED).then_some(status.lost_ms))
        })
    }
}

/// `virsh migrate --live --verbose`, shown as it goes.
fn migrate(from: &Host, to: &Host, options: &[&str]) -> Result<()> {
    let uri = to.uri();
    let command = [
        &["virsh", "migrate", "--live", "--verbose"],
        options,
        &[NAME, &uri],
    ]
    .concat();
    say(&format!("{} # {}", from.name(), command.join(" ")));
    let mut child = from
        .command("timeout")
        .args(["--kill-after=5", MOVE_LIMIT])
        .args(&command)
        .env("VIRSH_DEFAULT_CONNECT_URI", "qemu:///system")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("virsh")?;
    let said = child.stderr.take().map(progress).transpose()?.unwrap_or_default();
    let status = child.wait().context("virsh")?;
    ensure!(status.success(), "virsh failed ({status}): {said}");
    Ok(())
}

/// Shows virsh's progress on one line; returns what else it said.
fn progress(mut said: impl Read) -> Result<String> {
    let live = std::io::stdout().is_terminal();
    let mut all = Vec::new();
    let mut buffer = [0; 256];
    let mut shown = String::new();
    loop {
        let length = said.read(&mut buffer).context("virsh")?;
        all.extend_from_slice(&buffer[..length]);
        let text = String::from_utf8_lossy(&all).into_owned();
        let newest = text.split(['\r', '\n']).rfind(|piece| piece.ends_with("%]"));
        if let Some(newest) = newest.filter(|newest| *newest != shown) {
            shown = newest.to_owned();
            if live {
                print!("\r  {shown}");
                std::io::stdout().flush().context("standard output")?;
            }
        }
        if length == 0 {
            if live {
                println!();
            } else if !shown.is_empty() {
                say(&shown);
            }
            let else_said = text.split(['\r', '\n']).filter(|piece| !piece.ends_with("%]"));
            return Ok(else_said.collect::<Vec<_>>().join(" ").trim().to_owned());
        }
    }
}

/// The timeline that the source's engine has just kept.
fn newest_timeline(from: &Host) -> Result<PathBuf> {
    let timeline = from.last_timeline(Role::Source).with_context(|| {
        let log = from.libvirtd_log();
        let why = log.lines().rfind(|line| line.contains("libvirt's own migration"));
        let why = why.unwrap_or("the log does not say why");
        format!("the guest moved, but not through the engine: {why}")
    })?;
    let file = format!("{NAME}-{}-source.json", timeline.session);
    Ok(from.logs().join("virt-ferry").join(file))
}

/// What `virt-ferry-engine report` says of a timeline, which it also draws.
fn report(timeline: &Path, picture: &Path) -> Result<String> {
    let engine = std::env::current_exe()
        .context("this program")?
        .with_file_name("virt-ferry-engine");
    let output = Command::new(&engine)
        .arg("report")
        .arg(timeline)
        .arg("--svg")
        .arg(picture)
        .output()
        .with_context(|| engine.display().to_string())?;
    ensure!(
        output.status.success(),
        "{}: {}",
        engine.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn headline(text: &str) {
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

/// Prints a text, each of its lines indented.
fn say(text: &str) {
    for line in text.split('\n') {
        match line {
            "" => println!(),
            line => println!("  {line}"),
        }
    }
}
