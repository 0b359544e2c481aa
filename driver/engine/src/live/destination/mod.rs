//! The destination's engine: the guest is not here before everything is, exactly as it was sent.
//!
//! ```text
//!   Reserved ──attach──▶ Attached ──▶ Arrival (a thread serves the source) ──▶ committed ──▶ concluded
//!       └──────────────────┴──────────────── error ──▶ libvirt ends the incoming QEMU
//! ```

mod activation;
mod arrival;

use activation::{conclude, finish};
use arrival::Arrival;

use crate::control::{Control, Meter};
use crate::live::inspect;
use crate::live::land::Landing;
use crate::live::protection::{self, AtDestination};
use crate::live::reserve::{self, Backing};
use crate::live::signals::{End, Signals};
use crate::live::watch::{deadline, Watch, COMMAND};
use crate::live::Error;
use crate::qemu::cgroup::Membership;
use crate::qemu::{discover, Process, RamBlock};
use crate::report::{self, Migration, Outcome, Ram, Recorder, Role, Stage};
use crate::wire::{Listener, Security};
use ferry_contract::control::{Reply, Request, Settings, LINGER};
use ferry_contract::cookie::{self, Offer};
use ferry_contract::session::{Block, Guest};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::time::Duration;

/// How long libvirt may take to start QEMU and come back.
const UNTIL_ATTACH: Duration = Duration::from_secs(15 * 60);

/// Serves one plug-in, from its first request to its end.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), Error> {
    serve(control, meter, signals);
    Ok(())
}

fn serve(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) {
    let Some(Request::Reserve {
        guest,
        host,
        offer,
        memory_directory,
        promised,
        promised_huge,
        settings,
    }) = signals.next_request(Some(deadline(UNTIL_ATTACH)))
    else {
        return;
    };
    let span = tracing::info_span!("migration", guest = guest.name, role = "destination");
    let _entered = span.enter();
    let protection = match AtDestination::of(&settings, &offer) {
        Ok(protection) => protection,
        Err(error) => return control.reply(Reply::Failed(error.failure(&host))),
    };
    let place = Place {
        control,
        meter,
        signals,
        guest,
        host,
        offer,
        settings,
        protection,
    };
    match reserve(&place.offer, &memory_directory, promised, promised_huge) {
        Ok(Backing::Memory) => control.reply(Reply::Reserved),
        Ok(Backing::Other) => {
            let directory = memory_directory.display();
            let reason = format!(
                "{directory} (memory_backing_dir) is not on tmpfs: memory would be written to a disk"
            );
            return control.reply(Reply::NotEligible { reason });
        }
        Err(error) => return control.reply(Reply::Failed(error.failure(&place.host))),
    }
    let Some(Request::Attach {
        monitor,
        incoming,
        host: address,
        listen,
    }) = signals.next_request(Some(deadline(UNTIL_ATTACH)))
    else {
        return;
    };
    let mut recorder = place.recorder();
    recorder.enter(Stage::Reservation);
    match Attached::take_hold(&place, &monitor, listen.as_deref()) {
        Ok(attached) => attached.serve(&place, incoming.clone(), address, recorder),
        Err(error) => place.fail(recorder, &error),
    }
    // Ended before anybody has connected, QEMU leaves its socket behind. The plug-in removes it, too, but it may be gone.
    let _ = std::fs::remove_file(&incoming);
}

fn reserve(offer: &Offer, directory: &Path, promised: u64, promised_huge: u64) -> Result<Backing, Error> {
    let (huge, files): (Vec<_>, Vec<_>) = offer.blocks.iter().cloned().partition(Block::is_huge);
    reserve::check_huge(&huge, promised_huge, reserve::free_huge)?;
    if files.is_empty() {
        return Ok(Backing::Memory);
    }
    let (room, backing) = reserve::survey(directory)?;
    if backing == Backing::Memory {
        reserve::check(&files, promised, room, directory)?;
    }
    Ok(backing)
}

/// What every stage needs of its surroundings.
struct Place<'a> {
    control: &'a Control,
    meter: &'a Arc<Meter>,
    signals: &'a Arc<Signals>,
    guest: Guest,
    host: String,
    offer: Offer,
    settings: Settings,
    protection: AtDestination,
}

impl Place<'_> {
    fn recorder(&self) -> Recorder {
        let mut recorder = Recorder::new(Migration {
            session: self.offer.session,
            role: Role::Destination,
            guest: report::Guest {
                name: self.guest.name.clone(),
                uuid: self.guest.uuid,
            },
            local_host: self.host.clone(),
            peer_host: String::new(),
            encryption: protection::words(self.protection.encryption),
            streams: u32::from(self.settings.streams),
        });
        recorder.ram(Ram {
            blocks: self.offer.blocks.len() as u32,
            bytes: self.offer.blocks.iter().map(|block| block.size).sum(),
            resident: self.offer.blocks.iter().map(|block| block.resident).sum(),
        });
        recorder
    }

    /// The migration has failed here; libvirt will end the incoming QEMU and all its memory.
    fn fail(&self, recorder: Recorder, error: &Error) {
        self.signals.end(End::Failed(error.to_string()));
        let outcome = match error {
            Error::Cancelled => Outcome::Cancelled,
            error => Outcome::Failed {
                stage: recorder.stage(),
                error: error.to_string(),
            },
        };
        report::publish(&recorder.finish(outcome), &self.settings.log_directory);
        self.control.reply(Reply::Failed(error.failure(&self.host)));
    }
}

/// Reservation: the incoming QEMU is ours to fill, and the door is open.
struct Attached {
    watch: Arc<Watch>,
    landing: Landing,
    listener: Listener,
}

impl Attached {
    fn take_hold(place: &Place<'_>, monitor: &Path, listen: Option<&str>) -> Result<Self, Error> {
        let watch = Watch::open(monitor, Arc::clone(place.signals))?;
        inspect::is(&watch, monitor, place.guest.uuid)?;
        let pid = watch.command(|monitor| monitor.peer_pid())?;
        let process = Process::open(pid)?;
        let blocks = watch.command(|monitor| Ok(discover(monitor, &process, deadline(COMMAND))))??;
        let files = in_order(&place.offer, blocks)?;
        // What we write first is charged to us: to the guest, that is, while we are in its groups.
        place.signals.is_member(Membership::join(&process));
        let landing = Landing::new(files, Arc::clone(place.meter), Arc::clone(place.signals))?;
        watch.ignore_shared()?;
        let (first, last) = place.settings.ports;
        let listener = bind(listen, first..=last)?;
        place.signals.watch_listener(listener.stopper());
        Ok(Self {
            watch,
            landing,
            listener,
        })
    }

    /// Answers the plug-in, then serves the source's engine on one thread and the plug-in on this one.
    fn serve(self, place: &Place<'_>, incoming: PathBuf, address: String, mut recorder: Recorder) {
        let answer = cookie::Answer {
            session: place.offer.session,
            encryption: place.protection.encryption,
            certificate: place.protection.certificate.clone(),
            host: address,
            port: self.listener.address().port(),
        };
        let token = (*place.offer.token.bytes()).into();
        let security = Security {
            session: place.offer.session,
            token,
            protection: place.protection.protection.clone(),
        };
        place
            .meter
            .total
            .store(place.offer.blocks.iter().map(|block| block.size).sum(), Relaxed);
        let (tell, concluded) = channel();
        let (noted, notes) = channel();
        let arrival = Arrival {
            signals: Arc::clone(place.signals),
            meter: Arc::clone(place.meter),
            landing: self.landing,
            layout: place.offer.blocks.iter().map(|block| block.size).collect(),
            names: place
                .offer
                .blocks
                .iter()
                .map(|block| block.name.clone())
                .collect(),
            host: place.host.clone(),
            incoming,
            concluded,
            noted,
        };
        let span = tracing::Span::current();
        let listener = self.listener;
        let server = std::thread::Builder::new()
            .name("arrival".into())
            .spawn(move || span.in_scope(|| arrival.serve(&listener, &security)));
        if let Err(error) = server {
            return place.fail(recorder, &Error::system("start a thread")(error));
        }
        recorder.enter(Stage::PreCopy);
        place.control.reply(Reply::Listening(answer));
        match finish(place, &self.watch, &notes, &mut recorder) {
            Ok(()) => conclude(place, recorder, &notes, &tell),
            Err(error) => {
                // Our refusal makes libvirt end the guest here. Without a plug-in to hear it nothing is known.
                if !matches!(error, Error::Abandoned) {
                    let _ = tell.send(None);
                }
                place.fail(recorder, &error);
            }
        }
        drop(tell);
        // The source's thread ends once it has told, or the source is gone: its end of the connection ends the wait.
        while notes.recv_timeout(LINGER).is_ok() {}
    }
}

/// The offered blocks' files, in the offer's order; a guest that looks different here cannot be filled.
fn in_order(offer: &Offer, mut blocks: Vec<RamBlock>) -> Result<Vec<crate::memory::RamFile>, Error> {
    let count = blocks.len();
    let files: Vec<_> = offer
        .blocks
        .iter()
        .map(|wanted| {
            let same = |block: &RamBlock| block.name == wanted.name && block.size == wanted.size;
            let index = blocks.iter().position(same).ok_or_else(|| {
                Error::Elsewhere(format!(
                    "the QEMU started here has no RAM block {} of {} bytes; are both hosts' definitions the same?",
                    wanted.name, wanted.size
                ))
            })?;
            let file = blocks.swap_remove(index).file;
            // The source tells of what is on its pages; of huge ones it tells otherwise than of others.
            match file.backing().page() {
                page if page == wanted.page => Ok(file),
                page => Err(Error::Elsewhere(format!(
                    "RAM block {} is made of pages of {} KiB here and of {} KiB at the source; give the guest the same \
                     memory on both hosts (<hugepages>)",
                    wanted.name,
                    page >> 10,
                    wanted.page >> 10
                ))),
            }
        })
        .collect::<Result<_, Error>>()?;
    match blocks.is_empty() {
        true => Ok(files),
        false => Err(Error::Elsewhere(format!(
            "the QEMU started here has {count} RAM blocks, the source has {}",
            files.len()
        ))),
    }
}

/// Listens where the operator said, else on every address.
pub(crate) fn bind(listen: Option<&str>, ports: std::ops::RangeInclusive<u16>) -> Result<Listener, Error> {
    use std::net::ToSocketAddrs;
    let Some(name) = listen else {
        return Listener::bind(IpAddr::V6(Ipv6Addr::UNSPECIFIED), ports.clone())
            .or_else(|_| Listener::bind(IpAddr::V4(Ipv4Addr::UNSPECIFIED), ports))
            .map_err(Error::from);
    };
    let failed = Error::system("find the listen address");
    let mut found = (name, 0).to_socket_addrs().map_err(failed)?;
    let address = found
        .next()
        .ok_or_else(|| failed(std::io::ErrorKind::AddrNotAvailable.into()))?;
    Ok(Listener::bind(address.ip(), ports)?)
}
