//! A source that is not ours: whatever it says to a real destination engine with a real incoming QEMU, no guest runs there
//! afterwards, and nothing of it stays.
//!
//! The wire's own tests have every malformed frame; here it is that one of each kind ends the migration, by name, and takes the
//! incoming QEMU with it.

use std::fs::File;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use ferry_contract::cookie::{self, Answer, Offer};
use ferry_contract::session::{Block, Encryption, Token};
use ferry_engine::live::messages::{Answer as Said, Ask};
use ferry_engine::wire::chunk::{self, Kind};
use ferry_engine::wire::frame::{Frame, HEADER_LENGTH, PAGE};
use ferry_engine::wire::{connect, message, Connection, DataSender, Identity, Protection, Purpose, Security};
use ferry_engine::wire::{data::WINDOW, Error, Totals};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::phases::{Phases, LIVE};
use ferry_tests::scene::{said, usual, Scene};
use ferry_tests::wait::wait_until;
use nix::sched::{setns, CloneFlags};
use uuid::Uuid;

/// The guest's memory as `usual` has it.
const RAM: u64 = 256 << 20;
/// The most pages that a frame can announce, in bytes.
const HUGE: u32 = u32::MAX - PAGE as u32 + 1;
/// For whatever a destination does at once.
const SOON: Duration = Duration::from_secs(30);

fn soon() -> Instant {
    Instant::now() + SOON
}

/// A source of our making, and the destination that was prepared for it.
struct Source {
    address: SocketAddr,
    security: Security,
}

/// All connections of a session.
struct Links {
    control: Connection,
    data: Connection,
    device_state: Connection,
    _return_path: Connection,
}

impl Source {
    fn links(&self) -> Result<Links> {
        let open = |purpose| connect(&[self.address], &self.security, purpose, soon());
        let mut control = open(Purpose::Control)?;
        control.set_deadline(Some(soon()))?;
        let greeting = Ask::Open {
            streams: 1,
            host: "nowhere".into(),
        };
        message::send(&mut control, &greeting)?;
        let mut links = Links {
            data: open(Purpose::Data(0))?,
            device_state: open(Purpose::DeviceState)?,
            _return_path: open(Purpose::ReturnPath)?,
            control,
        };
        let said: Said = message::receive(&mut links.control)?;
        ensure!(matches!(said, Said::Ready { .. }), "{said:?}");
        Ok(links)
    }
}

impl Links {
    /// Waits for the destination to refuse, and returns why.
    fn refused(mut self) -> Result<String> {
        match message::receive(&mut self.control)? {
            Said::Refused { cause, .. } => Ok(cause),
            other => bail!("the destination said {other:?}"),
        }
    }
}

/// Prepares the destination for a source of our making, lets `attack` speak to it from the source's network, and judges what
/// is left. `cause` is what the destination's log must say.
fn attacked(scene: &Scene, cause: &str, attack: impl FnOnce(&Source) -> Result<()> + Send) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    // Without protection against changes the source's plug-in leaves the migration to libvirt: the offer is ours.
    let mut client = Phases::new(scene, one, two, LIVE)?;
    let (xml, theirs) = client.begin()?;
    let session = Uuid::new_v4();
    let identity = Identity::generate(session)?;
    let token = [7; Token::LENGTH];
    let offer = Offer {
        session,
        token: Token::new(token),
        encryption: Encryption::Always,
        certificate: identity.certificate().to_vec(),
        blocks: vec![Block {
            page: PAGE,
            name: "pc.ram".into(),
            size: RAM,
            resident: RAM,
        }],
    };
    let asked = cookie::with_offer(&with_end(&theirs), &offer)?;
    let asked = String::from_utf8(asked)?.trim_end_matches('\0').to_owned();
    let prepared = client.prepare(&xml, &asked)?;
    let (cookie, _) = prepared.map_err(|error| anyhow::anyhow!("Prepare: {error}"))?;
    let answer: Answer = cookie::answer(&with_end(&cookie))?.context("no answer")?;
    let source = Source {
        address: SocketAddr::new(two.address().parse()?, answer.port),
        security: Security {
            session,
            token: token.into(),
            protection: Protection::Encrypted {
                identity,
                peer: answer.certificate,
            },
        },
    };
    let before = said(two, cause);
    in_network_of(one, || attack(&source))?;
    wait_until(&format!("'{cause}' in the destination's log"), SOON, || {
        Ok(said(two, cause) > before)
    })?;
    // Such a source may lie to libvirt, too: it asks for the guest to be resumed.
    match client.finish(Some(&theirs), false)? {
        Ok(_) => bail!("the destination resumed a guest that it does not have"),
        Err(error) => println!("{cause}: {error}"),
    }
    drop(client);
    scene.is_unharmed(one)
}

/// A cookie as libvirt's functions have it.
fn with_end(cookie: &str) -> Vec<u8> {
    [cookie.as_bytes(), b"\0"].concat()
}

/// Runs this in the network namespace of a host.
fn in_network_of(host: &Host, run: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let namespace = format!("/proc/{}/ns/net", host.init());
    thread::scope(|scope| {
        let visit = scope.spawn(|| {
            setns(File::open(&namespace)?, CloneFlags::CLONE_NEWNET).context(namespace)?;
            run()
        });
        visit.join().expect("the source panicked")
    })
}

/// Sends bytes on the data stream that no source of ours would send.
fn frames(bytes: &[u8]) -> impl FnOnce(&Source) -> Result<()> + Send + '_ {
    |source| {
        let mut links = source.links()?;
        links.data.send(&[bytes], "attacking")?;
        println!("{}", links.refused()?);
        Ok(())
    }
}

fn header(frame: Frame) -> Vec<u8> {
    frame.encode(1).to_vec()
}

#[test]
fn a_hostile_source_gets_nowhere() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::start(lab, lab.host(1), usual("hostile"), 1)?;
        let page = vec![0x41; PAGE as usize];

        let outside = Frame::Data {
            block: 0,
            offset: RAM,
            length: PAGE as u32,
        };
        attacked(
            &scene,
            "leave RAM block 0",
            frames(&[header(outside), page.clone()].concat()),
        )
        .context("a page behind the end of RAM")?;
        let wrapped = Frame::Zero {
            block: 0,
            offset: PAGE,
            span: u64::MAX - PAGE + 1,
        };
        attacked(&scene, "leave RAM block 0", frames(&header(wrapped))).context("a span around zero")?;
        let strange = Frame::Zero {
            block: 9,
            offset: 0,
            span: PAGE,
        };
        attacked(&scene, "RAM block 9 does not exist", frames(&header(strange))).context("no such block")?;
        let mut oversized = header(Frame::Data {
            block: 0,
            offset: 0,
            length: PAGE as u32,
        });
        oversized[8..12].copy_from_slice(&HUGE.to_le_bytes());
        oversized[24..32].copy_from_slice(&u64::from(HUGE).to_le_bytes());
        attacked(&scene, &format!("a length of {HUGE} bytes"), frames(&oversized))
            .context("an oversized frame")?;
        attacked(&scene, "magic number", frames(&[0x55; HEADER_LENGTH])).context("no frame at all")?;

        attacked(&scene, "ended the connection", |source| {
            let mut links = source.links()?;
            let data = Frame::Data {
                block: 0,
                offset: 0,
                length: PAGE as u32,
            };
            links.data.send(&[&header(data), &page[..100]], "attacking")?;
            drop(links.data);
            match message::receive(&mut links.control)? {
                Said::Refused { .. } => Ok(()),
                other => bail!("{other:?}"),
            }
        })
        .context("a short frame")?;

        attacked(&scene, "counts or digests differ", |source| {
            let mut links = source.links()?;
            let mut sender = DataSender::new(links.data, WINDOW);
            sender.data(0, 0, &page)?;
            sender.finish()?;
            // Device state that comes too early is withheld from a QEMU whose memory is not there.
            chunk::send(&mut links.device_state, Kind::Held, &page)?;
            let lie = Ask::Commit {
                totals: vec![Totals::default()],
                memory: None,
            };
            match message::ask(&mut links.control, &lie)? {
                Said::Refused { .. } => Ok(()),
                other => bail!("the destination believed it: {other:?}"),
            }
        })
        .context("a lie about what was sent")?;

        attacked(&scene, "asked out of turn", |source| {
            let mut links = source.links()?;
            let ask = Ask::Open {
                streams: 1,
                host: "again".into(),
            };
            match message::ask(&mut links.control, &ask)? {
                Said::Refused { .. } => Ok(()),
                other => bail!("{other:?}"),
            }
        })
        .context("a request out of turn")?;

        attacked(&scene, "bad control message", |source| {
            let mut links = source.links()?;
            links
                .control
                .send(&[&u32::MAX.to_le_bytes(), b"{"], "attacking")?;
            links.refused().map(drop)
        })
        .context("an oversized message")?;

        // Strangers are turned away, and the door stays open for the one who is awaited: until the client gives up.
        attacked(&scene, "the session's token is wrong", |source| {
            let mut stranger = source.security.clone();
            stranger.token = [8; Token::LENGTH].into();
            match connect(&[source.address], &stranger, Purpose::Control, soon()) {
                Err(Error::Refused { .. }) => Ok(()),
                other => bail!("{other:?}"),
            }
        })
        .context("a wrong token")?;

        let (one, two) = (lab.host(1), lab.host(2));
        scene.move_to(one, two, &[]).context("the next migration")?;
        scene.move_to(two, one, &["--p2p"])
    })
}
