//! What goes wrong on the way: a connection that is cut, bytes that change on the network, on the disk, or at the source.

mod common;

use common::await_some;
use common::cold::{conclude, Engine, Scene, MIB};
use common::files::sha256;
use ferry_contract::cold::Definition;
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Encryption;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A wire between the engines that somebody meddles with.
struct Wire {
    port: u16,
    passed: Arc<AtomicU64>,
}

impl Wire {
    /// `meddle` sees what the source sends on a connection, and how much was sent on all before; false cuts the connection.
    fn to(port: u16, meddle: impl Fn(&mut [u8], u64) -> bool + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().port();
        let passed = Arc::new(AtomicU64::new(0));
        let (count, meddle) = (Arc::clone(&passed), Arc::new(meddle));
        std::thread::spawn(move || {
            for destination in listener.incoming() {
                let Ok(mut destination) = destination else { return };
                let Ok(mut source) = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))) else {
                    continue;
                };
                let (mut up, mut asks) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut up, &mut asks);
                    let _ = asks.shutdown(std::net::Shutdown::Both);
                });
                let (count, meddle) = (Arc::clone(&count), Arc::clone(&meddle));
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(length @ 1..) = source.read(&mut buffer) {
                        let before = count.fetch_add(length as u64, Ordering::Relaxed);
                        if !meddle(&mut buffer[..length], before)
                            || destination.write_all(&buffer[..length]).is_err()
                        {
                            break;
                        }
                    }
                    let _ = destination.shutdown(std::net::Shutdown::Both);
                    let _ = source.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        Self { port: own, passed }
    }
}

#[test]
fn a_cut_connection_goes_on_where_it_was() {
    let mut scene = Scene::default();
    let path = scene.image("disk.raw", 100, 64);
    let digest = sha256(&path);
    let (source, mut offer) = scene.begin();
    // Cut, whichever connection it is, whenever another 7 MiB have passed.
    let next = AtomicU64::new(7 * MIB);
    let wire = Wire::to(offer.port, move |_, before| {
        let cut = before >= next.load(Ordering::Relaxed);
        if cut {
            next.store(before + 7 * MIB, Ordering::Relaxed);
        }
        !cut
    });
    offer.port = wire.port;
    let mut destination = Engine::start("cold-destination");
    assert_eq!(destination.ask(&scene.pull(&offer)), Reply::ColdPulled);
    let passed = wire.passed.load(Ordering::Relaxed);
    // Each cut costs the blocks under way at most: 8 of 1 MiB, of two connections, about eight times.
    assert!(passed > 64 * MIB && passed < 180 * MIB, "{passed}");
    conclude(&scene, source, destination, &[]);
    assert_eq!(sha256(&scene.destination().join("disk.raw")), digest);
    scene.assert_clean();
}

#[test]
fn a_byte_flipped_on_the_way_is_noticed_and_named() {
    let mut scene = Scene {
        encryption: Encryption::Never,
        ..Scene::default()
    };
    scene.image("disk.raw", 16, 8);
    let (source, mut offer) = scene.begin();
    let wire = Wire::to(offer.port, |bytes, before| {
        if (3 * MIB..3 * MIB + (64 << 10)).contains(&before) {
            // In the middle of a block's noise: frames are a few bytes of a megabyte.
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        true
    });
    offer.port = wire.port;
    let mut destination = Engine::start("cold-destination");
    let failure = destination.refusal(&scene.pull(&offer));
    assert!(failure.cause.contains("disk.raw is damaged"), "{}", failure.cause);
    source.end_aborted();
    scene.assert_not_there();
    scene.assert_clean();
}

#[test]
fn a_byte_flipped_on_the_disk_is_noticed_and_named() {
    let mut scene = Scene::limited(2 * MIB);
    scene.image("first.raw", 16, 15);
    let (mut source, mut destination) = scene.pulling();
    // A chunk is read back when it is whole, which takes some seconds at this rate.
    let file = await_some("a block to be written", || {
        let path = fs::read_dir(scene.destination()).unwrap().next()?.unwrap().path();
        let file = File::options().read(true).write(true).open(path).ok()?;
        let mut byte = [0];
        file.read_at(&mut byte, 5000).ok()?;
        (byte[0] != 0).then_some(file)
    });
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], 5000).unwrap();
    source.tell(&Request::Limit { bandwidth: 0 });
    let failure = destination.failure();
    assert!(
        failure.cause.contains("first.raw is damaged: at 0"),
        "{}",
        failure.cause
    );
    source.end_aborted();
    scene.assert_not_there();
    scene.assert_clean();
}

#[test]
fn what_changes_meanwhile_stays_at_the_source() {
    for change in ["definition", "file"] {
        let mut scene = Scene::default();
        let path = scene.image("disk.raw", 8, 4);
        let definition = scene.directory.path().join("g.xml");
        fs::write(&definition, "<domain/>").unwrap();
        let found = fs::metadata(&definition).unwrap();
        let Request::ColdServe(mut serve) = scene.serve() else {
            panic!()
        };
        serve.definition = Some(Definition {
            path: definition.clone(),
            inode: found.ino(),
            size: found.len(),
            modified: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
        });
        let mut source = Engine::start("cold-source");
        let Reply::ColdOffer(offer) = source.ask(&Request::ColdServe(serve)) else {
            panic!()
        };
        let mut destination = Engine::start("cold-destination");
        assert_eq!(destination.ask(&scene.pull(&offer)), Reply::ColdPulled);
        match change {
            "definition" => fs::write(&definition, "<domain> </domain>").unwrap(),
            _ => File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .write_all_at(b"late", 0)
                .unwrap(),
        }
        let failure = destination.refusal(&Request::ColdCommit);
        assert!(failure.cause.contains("was changed while"), "{}", failure.cause);
        assert_eq!(failure.host, "host1");
        assert_eq!(destination.ask(&Request::ColdAbort), Reply::ColdAborted);
        assert!(source.refusal(&Request::ColdConfirm).cause.contains("stays here"));
        assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
        source.end();
        destination.end();
        scene.assert_not_there();
        scene.assert_clean();
        assert!(path.exists());
    }
}
