//! The disks of a guest that is shut off go to another data store of this host: the plug-in in the daemon does it, this
//! asks, shows how far it is, and tells what has been done.

use anyhow::{anyhow, Context, Result};
use clap::Args;
use ferry_contract::cold::storage::{Order, Report, FORMAT};
use nix::sys::signal::{SigSet, Signal};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{clear_error_callback, Error};

/// Between two looks how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Characters of a full bar.
const BAR: usize = 30;

/// What is asked on the command line.
#[derive(Args)]
pub struct Arguments {
    /// The guest, by name
    guest: String,
    /// A disk as the guest calls it (vda), once or several times; without any, all that are files
    #[arg(long = "disk", value_name = "TARGET")]
    disks: Vec<String>,
    /// An absolute directory, or the name of an active storage pool that is one
    #[arg(long, value_name = "DIRECTORY|POOL")]
    to: String,
    /// Only say what would move, and what is in the way
    #[arg(long)]
    dry_run: bool,
    /// libvirt's URI
    #[arg(short, long, default_value = "qemu:///system")]
    connect: String,
}

/// Has it done.
///
/// # Errors
/// Everything that is in the way, or what failed: then the guest has the disks it had.
pub fn run(arguments: Arguments) -> Result<()> {
    // Before there are threads: all of them leave Ctrl-C to the one that waits for it.
    let mut interrupts = SigSet::empty();
    interrupts.add(Signal::SIGINT);
    interrupts.thread_block().context("cannot listen to Ctrl-C")?;
    // libvirt would print what is told here, too.
    clear_error_callback();
    let open = || {
        let uri = &arguments.connect;
        Connect::open(Some(uri)).with_context(|| format!("cannot ask libvirt at {uri}"))
    };
    // One waits for the answer, the other looks on.
    let (asking, looking) = (open()?, open()?);
    let domain = looking
        .lookup_domain_by_name(&arguments.guest)
        .map_err(|error| anyhow!("guest {}: {}", arguments.guest, error.message()))?;
    let order = Order {
        guest: arguments.guest.clone(),
        disks: arguments.disks,
        to: arguments.to,
        dry_run: arguments.dry_run,
    };
    let order = serde_json::to_string(&order)?;
    cancel_on(interrupts, domain.clone())?;
    let (sender, answer) = channel();
    std::thread::Builder::new().spawn(move || {
        // Who waits for it is there until it comes.
        let _ = sender.send(asking.domain_xml_to_native(FORMAT, &order, 0));
    })?;
    let mut bar = Bar::new();
    let answer = loop {
        match answer.recv_timeout(LOOK) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Timeout) => bar.show(&domain),
            Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("the question was lost")),
        }
    };
    bar.clear();
    let report: Report = serde_json::from_str(&answer.map_err(|error| explained(&arguments.guest, &error))?)
        .context("the plug-in is of another release")?;
    print!("{}", told(&arguments.guest, &report, arguments.dry_run));
    Ok(())
}

/// Ctrl-C ends the move, not this command: what was copied goes first.
fn cancel_on(interrupts: SigSet, domain: Domain) -> Result<()> {
    std::thread::Builder::new().spawn(move || {
        while interrupts.wait().is_ok() {
            // SAFETY: a domain that lives as long as this thread.
            match unsafe { virt_sys::virDomainAbortJob(domain.as_ptr()) } {
                0 => eprintln!(
                    "virt-ferry: interrupted; what was copied is removed, unless the guest has it by now"
                ),
                _ => eprintln!(
                    "virt-ferry: it cannot be ended now: {}",
                    Error::last_error().message()
                ),
            }
        }
    })?;
    Ok(())
}

/// libvirt's error, for a person.
fn explained(guest: &str, error: &Error) -> anyhow::Error {
    let message = error.message();
    if error.domain().to_raw() == virt_sys::VIR_FROM_RPC {
        return anyhow!(
            "the daemon was lost ({message}); it brings the move to an end, or undoes it: virt-ferry recover {guest}, then \
             virsh domblklist {guest}"
        );
    }
    match message.contains(FORMAT) {
        true => anyhow!("libvirt's daemon has not loaded the plug-in (virt-ferry check): {message}"),
        false => anyhow!("{message}"),
    }
}

/// How far it is, on a terminal.
struct Bar {
    began: Option<Instant>,
    terminal: bool,
}

impl Bar {
    fn new() -> Self {
        Self {
            began: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, domain: &Domain) {
        if !self.terminal {
            return;
        }
        // Before it copies, and at its end, there is nothing to show.
        let Ok(job) = domain.job_info() else { return };
        let (total, done) = (job.data_total.unwrap_or(0), job.data_processed.unwrap_or(0));
        if total == 0 {
            return;
        }
        let began = *self.began.get_or_insert_with(Instant::now);
        // One that has gone has no use for it.
        let _ = write!(
            std::io::stderr(),
            "\r{}\x1b[K",
            line(done, total, began.elapsed())
        );
    }

    fn clear(&self) {
        if self.began.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let share = done as f64 / total as f64;
    let full = (share * BAR as f64) as usize;
    let speed = done as f64 / elapsed.as_secs_f64().max(0.001);
    format!(
        "[{}{}] {:3.0} % of {}, {}/s",
        "#".repeat(full.min(BAR)),
        " ".repeat(BAR.saturating_sub(full)),
        share * 100.0,
        crate::check::size(total),
        crate::check::size(speed as u64)
    )
}

/// A report in words.
fn told(guest: &str, report: &Report, dry_run: bool) -> String {
    let mut text = String::new();
    let verb = match (dry_run, report.moved.len()) {
        (_, 0) => "nothing to move",
        (true, _) => "would move",
        (false, _) => "moved",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{guest}: {verb}");
    for one in &report.moved {
        let (from, to, size) = (
            one.from.display(),
            one.to.display(),
            crate::check::size(one.bytes),
        );
        let _ = writeln!(text, "  {}  {from} -> {to} ({size})", one.disk);
    }
    for one in &report.stays {
        let _ = writeln!(text, "  stays: {} ({})", one.path.display(), one.reason);
    }
    for one in &report.kept {
        let _ = writeln!(text, "  not deleted: {} ({})", one.path.display(), one.reason);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::storage::Moved;
    use ferry_contract::cold::Kept;

    #[test]
    fn a_bar_grows() {
        let second = Duration::from_secs(1);
        assert_eq!(
            line(0, 1 << 30, second),
            format!("[{}]   0 % of 1.0 GiB, 0 MiB/s", " ".repeat(30))
        );
        assert_eq!(
            line(1 << 29, 1 << 30, second),
            format!(
                "[{}{}]  50 % of 1.0 GiB, 512 MiB/s",
                "#".repeat(15),
                " ".repeat(15)
            )
        );
        assert!(line(1 << 30, 1 << 30, Duration::ZERO).contains("100 %"));
    }

    #[test]
    fn a_report_is_told() {
        let report = Report {
            moved: vec![Moved {
                disk: "vda".into(),
                from: "/a/x".into(),
                to: "/b/x".into(),
                bytes: 3 << 29,
            }],
            stays: vec![Kept {
                path: "/a/base".into(),
                reason: "guest db refers to it".into(),
            }],
            kept: Vec::new(),
        };
        assert_eq!(
            told("web", &report, true),
            "web: would move\n  vda  /a/x -> /b/x (1.5 GiB)\n  stays: /a/base (guest db refers to it)\n"
        );
        assert!(told("web", &Report::default(), false).contains("nothing to move"));
    }
}
