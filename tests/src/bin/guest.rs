//! The test guests by hand.
//!
//! ```text
//! guest xml demo --install SHARE/guests --set 64 --rate 8M --ip 192.168.77.101/24 >demo.xml
//! tests/lab exec host1 -- virsh create …
//! guest listen --netns /proc/PID/ns/net --ip 192.168.77.101
//! guest check --netns /proc/PID/ns/net --ip 192.168.77.101
//! guest order --netns /proc/PID/ns/net --ip 192.168.77.101 rate 8
//! guest judge RAM-FILE --end 100
//! ```

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Result};
use clap::{Args, Parser, Subcommand};
use ferry_tests::guest::beat::Listener;
use ferry_tests::guest::ram::RamFile;
use ferry_tests::guest::remote::Remote;
use ferry_tests::guest::{Accel, Address, Backing, Guest, Machine, Rate};

/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "The test guests by hand")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs a guest's files and prints its domain XML
    Xml(Xml),
    /// Prints a guest's silences of more than 5 ms, and once a second the longest so far
    Listen(Reach),
    /// Has a guest check all its memory: prints the verdict, fails unless it is good
    Check(Reach),
    /// Sends a guest a command that is answered by ok: rate N, set MIB, reset, quit
    Order {
        #[command(flatten)]
        reach: Reach,
        /// The command's words
        words: Vec<String>,
    },
    /// Judges a stopped boot sector guest by its RAM file
    Judge {
        /// The RAM file
        file: PathBuf,
        /// End of the guest's range, MiB
        #[arg(long, default_value_t = 100)]
        end: u32,
    },
}

#[derive(Args)]
struct Reach {
    /// Network namespace to speak from, such as /run/netns/NAME or /proc/PID/ns/net
    #[arg(long)]
    netns: Option<PathBuf>,
    /// The guest's address
    #[arg(long)]
    ip: Ipv4Addr,
}

#[derive(Args)]
struct Xml {
    /// Domain name
    name: String,
    /// The directory that hosts see as --dir, seen from here; kernel, initrd or boot disk and an empty log are put there
    #[arg(long)]
    install: Option<PathBuf>,
    /// Directory of the guest's files as the hosts see it
    #[arg(long, default_value = Guest::DIR)]
    dir: PathBuf,
    /// The boot sector under KVM instead of Linux under TCG
    #[arg(long)]
    boot: bool,
    /// TCG, also for the boot sector
    #[arg(long)]
    tcg: bool,
    /// Chipset q35 instead of pc
    #[arg(long)]
    q35: bool,
    /// Anonymous memory instead of a shared file
    #[arg(long)]
    anonymous: bool,
    /// Memory, MiB
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Working set of the Linux guest or end of the boot sector's range, MiB
    #[arg(long, default_value_t = 16)]
    set: u32,
    /// Memory filled once, MiB
    #[arg(long, default_value_t = 0)]
    ram: u64,
    /// Pages a second, MiB a second (8M) or max
    #[arg(long, default_value = "1000")]
    rate: Rate,
    /// The guest's address; its NIC is on labbr0
    #[arg(long)]
    ip: Option<Address>,
    /// A raw disk image with O_DIRECT load on its first 16 MiB, 100 blocks a second
    #[arg(long)]
    disk: Option<PathBuf>,
}

impl Xml {
    fn guest(self) -> Guest {
        let mut guest = match self.boot {
            true => Guest::boot(&self.name).range(self.set, 0),
            false => Guest::linux(&self.name)
                .working_set(self.set.into())
                .filled(self.ram)
                .rate(self.rate),
        };
        guest = guest.memory_mib(self.memory).vcpus(self.vcpus).dir(self.dir);
        if self.tcg {
            guest = guest.accel(Accel::Tcg);
        }
        if self.q35 {
            guest = guest.machine(Machine::Q35);
        }
        if self.anonymous {
            guest = guest.backing(Backing::Anonymous);
        }
        if let Some(address) = self.ip {
            guest = guest.network("labbr0", address);
        }
        if let Some(path) = self.disk {
            guest = guest.disk(path, "raw").disk_load(16, Rate(100));
        }
        guest
    }
}

impl Reach {
    fn remote(&self) -> Result<Remote> {
        Remote::new(self.netns.as_deref(), self.ip)
    }

    fn listen(&self) -> Result<()> {
        let listener = Listener::start(self.netns.as_deref())?;
        let mut told = 0;
        loop {
            thread::sleep(Duration::from_secs(1));
            let heard = listener.heard(self.ip);
            for silence in &heard.silences[told..] {
                let ran = silence.guest;
                println!(
                    "silent for {:?} before heartbeat {}; the guest ran {ran:?}",
                    silence.length, silence.number
                );
            }
            told = heard.silences.len();
            println!(
                "heard {} missing {} repeated {} longest {:?}",
                heard.received, heard.missing, heard.repeated, heard.longest.length
            );
        }
    }
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Xml(xml) => {
            let install = xml.install.clone();
            let guest = xml.guest();
            if let Some(host_dir) = install {
                guest.install(&host_dir)?;
            }
            print!("{}", guest.xml());
        }
        Command::Listen(reach) => reach.listen()?,
        Command::Check(reach) => {
            let verdict = reach.remote()?.check("by-hand", PATIENCE)?;
            println!("{verdict}");
            ensure!(verdict.ok(), "the guest's memory is damaged");
        }
        Command::Order { reach, words } => reach.remote()?.order(&words.join(" "), PATIENCE)?,
        Command::Judge { file, end } => {
            let state = RamFile::open(file)?.judge_boot(end)?;
            println!("undamaged: value {}, edge at page {:?}", state.value, state.edge);
        }
    }
    Ok(())
}
