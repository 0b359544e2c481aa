//! `virt-ferry`: what an administrator asks on the command line.

mod check;
mod move_storage;
mod recover;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Migration of libvirt's guests with a memory path of its own, and of guests that are shut off with all their files.
#[derive(Parser)]
#[command(
    name = "virt-ferry",
    version,
    about,
    after_help = "Examples:\n  virt-ferry check\n  virt-ferry check web db && echo both can be moved\n  virt-ferry move-storage web --to /srv/fast --dry-run"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say for each guest whether virt-ferry can move it, and if not, why and what to do; nothing is changed
    ///
    /// Ends with 0 if this host and all guests that were looked at and run are eligible, 1 if not, 2 if that cannot be
    /// known.
    Check {
        /// Guests, by name; without any, all of this host's
        guests: Vec<String>,
        /// libvirt's URI
        #[arg(short, long, default_value = "qemu:///system")]
        connect: String,
    },
    /// Bring interrupted cold migrations (of guests that are shut off) to an end, and say how each stands
    ///
    /// The daemon does so by itself, for about an hour; this makes it try at once. A guest that is between two hosts starts on
    /// neither until both have agreed: run it on both. Ends with 0 if nothing is left, 1 if something is, 2 if that cannot be
    /// known.
    Recover {
        /// Guests, by name; without any, all of this host's
        guests: Vec<String>,
        /// Give one guest's move up; at a host to which it was to go, all of it that has come is removed, though the source may
        /// be lost. Refused at a source that has let go of the guest
        #[arg(long, value_name = "GUEST", conflicts_with = "guests")]
        abort: Option<String>,
        /// Take these guests for this host's without asking HOST, which is lost for good with all its storage; should it come
        /// back, they must not be started there
        #[arg(long, value_name = "HOST", requires = "guests", conflicts_with = "abort")]
        lost: Option<String>,
        /// libvirt's URI
        #[arg(short, long, default_value = "qemu:///system")]
        connect: String,
    },
    /// Move the disks of a guest that is shut off to another directory or storage pool of this host
    ///
    /// Its disks, with all images they stand on and their data files, are copied, verified and given to the guest, and then
    /// the old files are deleted. Files that others need stay. The daemon does it: Ctrl-C ends it and removes what was
    /// copied, but if this command dies, it goes on. Ends with 0 if it is done, 2 if not: then the guest
    /// has what it had, unless the error says which disks it has.
    #[command(
        after_help = "Examples:\n  virt-ferry move-storage web --to /srv/fast --dry-run\n  virt-ferry move-storage web --to /srv/fast\n  virt-ferry move-storage web --disk vdb --disk vdc --to bulk"
    )]
    MoveStorage(move_storage::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Check { guests, connect } => run(&connect, &guests),
        Command::Recover {
            abort: Some(guest),
            connect,
            ..
        } => recover::abort(&connect, &guest),
        Command::Recover {
            lost: Some(host),
            guests,
            connect,
            ..
        } => guests.iter().try_fold(true, |done, guest| {
            Ok(recover::own(&connect, guest, &host)? && done)
        }),
        Command::Recover { guests, connect, .. } => recover::run(&connect, &guests),
        Command::MoveStorage(arguments) => move_storage::run(arguments).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("virt-ferry: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(connect: &str, guests: &[String]) -> Result<bool> {
    // First: a daemon that has ended because it was idle is started by this.
    let libvirt = check::connect(connect);
    let host = check::host();
    println!("host");
    for finding in &host {
        println!("  {finding}");
    }
    let found = check::guests(&libvirt?, guests)?;
    println!("guests");
    let width = found
        .iter()
        .map(|(name, _)| name.chars().count())
        .max()
        .unwrap_or(0);
    for (name, finding) in &found {
        println!("  {name:width$}  {finding}");
    }
    let all = host.iter().chain(found.iter().map(|(_, finding)| finding));
    Ok(!all
        .into_iter()
        .any(|finding| matches!(finding, check::Finding::No(_))))
}
