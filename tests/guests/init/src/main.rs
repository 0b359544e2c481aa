//! The guest's init: the only process it has.
//!
//! It mounts what it needs, loads the virtio modules, brings up the NIC, fills its memory and then writes and checks it until it
//! is told to stop. Everything it has to say is a line on the serial console (see `ferry_guest::line`).

mod area;
mod beat;
mod boot;
mod clock;
mod command;
mod disk;
mod load;
mod net;
mod report;
mod system;

use std::sync::Arc;
use std::thread;

use ferry_guest::config::{Config, PAGES_PER_MIB};

use crate::area::Area;
use crate::report::Report;

fn main() {
    let report = Arc::new(Report::default());
    match start(&report) {
        Ok(guest) => guest.run(),
        Err(reason) => {
            report::say(format_args!("fatal {reason}"));
            boot::power_off();
        }
    }
}

/// The running guest's parts, shared by its threads.
struct Guest {
    config: Config,
    report: Arc<Report>,
    area: Arc<Area>,
    load: Arc<load::Load>,
    landing: Option<Arc<disk::Landing>>,
}

fn start(report: &Arc<Report>) -> Result<Guest, String> {
    boot::mount_all()?;
    let config = Config::parse(&boot::command_line()?)?;
    command::silence_echo()?;
    boot::load_modules()?;
    if let Some(disk) = &config.files {
        report::say(format_args!("files ok read={}", system::check_files(disk)?));
    }
    if config.tpm {
        report::say(format_args!("tpm resets={}", system::tpm_resets()?));
    }
    if let Some(address) = config.ip {
        net::bring_up("eth0", address)?;
    }
    let set = config.set.saturating_mul(PAGES_PER_MIB);
    let pages = config.ram.saturating_mul(PAGES_PER_MIB).saturating_add(set);
    boot::require_memory(pages)?;
    report::say(format_args!("filling pages={pages}"));
    let area = Arc::new(Area::fill("memory", pages, Arc::clone(report)));
    let load = Arc::new(load::Load::new(set, config.rate, config.order));
    let landing = match &config.disk {
        Some(disk) => Some(Arc::new(disk::Landing::open(disk, Arc::clone(report))?)),
        None => None,
    };
    Ok(Guest {
        config,
        report: Arc::clone(report),
        area,
        load,
        landing,
    })
}

impl Guest {
    /// Starts the threads and reports; ends with the machine.
    fn run(self) -> ! {
        let guest = Arc::new(self);
        let config = &guest.config;
        report::say(format_args!(
            "up pages={} set={} {config}",
            guest.area.pages(),
            guest.load.set()
        ));

        spawn(&guest, |guest| guest.load.write(&guest.area));
        spawn(&guest, |guest| guest.area.check_for_ever(guest.config.check));
        spawn(&guest, |guest| clock::measure_stalls(&guest.report));
        spawn(&guest, |guest| clock::measure_lost_time(&guest.report));
        spawn(&guest, command::serve_serial);
        if guest.landing.is_some() {
            spawn(&guest, |guest| {
                guest.landing.iter().for_each(|landing| landing.run())
            });
        }
        if config.ip.is_some() {
            spawn(&guest, command::serve_udp);
        }
        if config.beat_target().is_some() {
            spawn(&guest, |guest| beat::send(&guest.config, &guest.report));
        }
        report::every_second(&guest)
    }
}

/// Starts one of the guest's threads. A thread that ends by a panic ends the guest: half a test is no test.
fn spawn(guest: &Arc<Guest>, work: impl FnOnce(&Guest) + Send + 'static) {
    let guest = Arc::clone(guest);
    thread::spawn(move || {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&guest))).is_err() {
            report::say(format_args!("fatal a thread of the guest panicked"));
            boot::power_off();
        }
    });
}
