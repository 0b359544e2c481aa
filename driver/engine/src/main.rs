//! `virt-ferry-engine`: one process a migration and host, started by the plug-in.

use anyhow::Context;
use clap::{Parser, Subcommand};
use ferry_engine::cold;
use ferry_engine::control::{Control, Meter};
use ferry_engine::live::signals::Signals;
use ferry_engine::live::{destination, source};
use ferry_engine::qemu::{injector, Monitor, MonitorError};
use nix::sys::signal::{raise, SigSet, Signal};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Moves the memory of one guest, for libvirt's plug-in.
#[derive(Parser)]
#[command(
    name = "virt-ferry-engine",
    version,
    about,
    after_help = "Examples:\n  virt-ferry-engine report /var/log/virt-ferry/guest-….json --svg move.svg\n  virt-ferry-engine rescue /var/lib/libvirt/qemu/domain-1-guest/virt-ferry-monitor.sock"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the plug-in of the host a guest leaves; requests come on standard input, a socket
    Source,
    /// Serve the plug-in of the host a guest comes to; requests come on standard input, a socket
    Destination,
    /// Serve the plug-in of the host that a guest which is shut off leaves; requests come on standard input, a socket
    ColdSource,
    /// Serve the plug-in of the host that such a guest comes to; requests come on standard input, a socket
    ColdDestination,
    /// Serve the plug-in of a host on which such a guest's disks go to another place; requests come on standard input, a socket
    ColdMove,
    /// Bring such a migration to its end after a crash; requests come on standard input, a socket
    ColdRecover,
    /// Say whether a guest can be moved, as one JSON object; without a monitor, whether this kernel can track writes
    Check {
        /// The private monitor of the guest's QEMU
        monitor: Option<PathBuf>,
    },
    /// Fetch a userfaultfd from a QEMU for the engine that asks, on standard input, a socket
    #[command(hide = true)]
    Inject {
        /// The QEMU's process
        pid: i32,
        /// Milliseconds until it must have stopped
        patience: u64,
    },
    /// Clear x-ignore-shared on a QEMU whose engine died
    Rescue {
        /// The QEMU's private monitor
        monitor: PathBuf,
    },
    /// Show the timeline of a migration
    Report {
        /// The timeline, a JSON file
        file: PathBuf,
        /// Draw it into this file
        #[arg(long)]
        svg: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // A report is a person's, who may have it read from a pipe of theirs.
    if !matches!(arguments.command, Command::Report { .. }) {
        close_inherited();
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("VIRT_FERRY_LOG");
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")))
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match arguments.command {
        Command::Source => serve(source::run, Arc::default()),
        Command::Destination => {
            let signals = Arc::default();
            outlive_the_guest(&signals).context("cannot take signals")?;
            serve(destination::run, signals)
        }
        Command::ColdSource => serve(cold::source::run, Arc::default()),
        Command::ColdDestination => serve(cold::destination::run, Arc::default()),
        Command::ColdMove => serve(cold::within::run, Arc::default()),
        Command::ColdRecover => serve(cold::recover::run, Arc::default()),
        Command::Check { monitor } => {
            let verdict = ferry_engine::live::inspect::verdict(monitor.as_deref());
            println!("{}", serde_json::to_string(&verdict)?);
            Ok(())
        }
        Command::Inject { pid, patience } => {
            injector::serve(pid, Duration::from_millis(patience), &standard_input()?);
            Ok(())
        }
        Command::Rescue { monitor } => rescue(&monitor),
        Command::Report { file, svg } => Ok(ferry_engine::report::command(
            &file,
            svg.as_deref(),
            &mut std::io::stdout(),
        )?),
    }
}

/// Closes all files but standard input, output and error. The daemon has guests' network devices and the like open while it
/// starts them, and not for its children: libvirt closes everything in its own (libvirt 11.3, virCommandMassClose). Held
/// here, a device would be busy for as long as the migration of another guest takes.
fn close_inherited() {
    // SAFETY: close_range(2) takes integers and touches no memory, and nothing has been opened yet that anybody owns.
    // Before Linux 5.9 it fails, where no guest can be tracked anyway.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// One end of a migration, from its plug-in's first request to its end.
type Role = fn(&Control, &Arc<Meter>, &Arc<Signals>) -> Result<(), ferry_engine::live::Error>;

fn serve(role: Role, signals: Arc<Signals>) -> anyhow::Result<()> {
    let socket = standard_input()?;
    let meter = Arc::new(Meter::default());
    let control = Control::open(socket, Arc::clone(&meter), Arc::clone(&signals))
        .context("cannot listen to the plug-in")?;
    Ok(role(&control, &meter, &signals)?)
}

/// Whoever ends a guest's cgroup ends all that is in it by SIGTERM: systemd, at libvirt's bidding. While this process is
/// there to fill the guest's memory, it is not meant: it leaves, and its session ends as that of any guest that dies.
/// Nor is it just after, for it may have been among the group's members when they were read. Otherwise it does what it is
/// told. To be called before there are other threads; programs that are started later would be deaf to the signal.
fn outlive_the_guest(signals: &Arc<Signals>) -> anyhow::Result<()> {
    let mut told = SigSet::empty();
    told.add(Signal::SIGTERM);
    told.thread_block()?;
    let signals = Arc::clone(signals);
    let take = move || loop {
        match told.wait() {
            Ok(_) if signals.leave_cgroups() => {
                tracing::info!("told to end (SIGTERM) with the guest's cgroup: left it, and went on");
            }
            Ok(_) => {
                tracing::warn!("told to end (SIGTERM)");
                // As without this thread. Nothing gets past it.
                let _ = told.thread_unblock().and_then(|()| raise(Signal::SIGTERM));
            }
            Err(_) => return,
        }
    };
    std::thread::Builder::new().name("told".into()).spawn(take)?;
    Ok(())
}

fn standard_input() -> anyhow::Result<UnixStream> {
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input is not the socket of who started this")?;
    Ok(UnixStream::from(socket))
}

/// Waits for QEMU's migration to end, if one is under way, and clears the capability.
fn rescue(monitor: &std::path::Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(8);
    let mut qemu = Monitor::connect(monitor, deadline)?;
    loop {
        match qemu.set_ignore_shared(false, deadline) {
            Err(MonitorError::Refused { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return Ok(outcome?),
        }
    }
}
