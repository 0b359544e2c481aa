//! Data streams over real TCP.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use super::*;
use crate::wire::frame::{Frame, Invalid, Rejection, HEADER_LENGTH};
use crate::wire::testing::{pair, raw_receiver, raw_sender};
use crate::wire::{Connection, Error, Purpose, Result};

const LAYOUT: [u64; 2] = [48 << 20, 1 << 20];

/// A guest's memory as the receiver builds it.
struct Memory {
    blocks: Vec<Vec<u8>>,
    rounds: Vec<u64>,
}

impl Memory {
    /// Full of a byte that is never sent.
    fn new() -> Memory {
        Memory {
            blocks: LAYOUT.iter().map(|&length| vec![0xee; length as usize]).collect(),
            rounds: Vec::new(),
        }
    }
}

impl Apply for Memory {
    fn data(&mut self, block: u16, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.blocks[usize::from(block)][offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, block: u16, offset: u64, span: u64) -> io::Result<()> {
        self.blocks[usize::from(block)][offset as usize..][..span as usize].fill(0);
        Ok(())
    }

    fn barrier(&mut self, round: u64) -> io::Result<()> {
        self.rounds.push(round);
        Ok(())
    }
}

/// Repeatable noise.
fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(seed ^ (seed >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Runs `send` against a receiver; what each side found, and the memory as it ended.
fn transfer(
    encrypted: bool,
    send: impl FnOnce(DataSender) -> Result<Totals> + Send,
) -> (Result<Totals>, Result<Totals>, Memory) {
    let (source, destination) = pair(encrypted, Purpose::Data(0));
    let mut memory = Memory::new();
    let (sent, received) = thread::scope(|scope| {
        let sending = scope.spawn(move || send(DataSender::new(source, WINDOW)));
        let received = DataReceiver::new(destination, &LAYOUT).run(&mut memory);
        (sending.join().unwrap(), received)
    });
    (sent, received, memory)
}

#[test]
fn memory_arrives_whole_in_frames_of_all_sizes() {
    for encrypted in [false, true] {
        let guest = noise(LAYOUT[0] as usize, 1);
        let small = noise(LAYOUT[1] as usize, 2);
        let (sent, received, memory) = transfer(encrypted, |mut sender| {
            let progress = sender.progress();
            // Growing pieces: 4 KiB, 8 KiB, ... beyond a frame's limit, then from the start again.
            let (mut at, mut pages) = (0, 1);
            while at < guest.len() {
                let end = guest.len().min(at + pages * 4096);
                sender.data(0, at as u64, &guest[at..end])?;
                (at, pages) = (end, if pages > 700 { 1 } else { pages * 2 });
            }
            sender.data(1, 0, &small)?;
            sender.zero(1, 8192, 4096)?;
            sender.barrier(1)?;
            assert_eq!(progress.acknowledged(), progress.wire_bytes());
            assert_eq!(progress.data_bytes(), LAYOUT[0] + LAYOUT[1]);
            sender.data(1, 4096, &guest[..4096])?; // a page again, in a later round
            sender.barrier(2)?;
            sender.finish()
        });
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!(sent, received);
        assert_eq!(sent.data_bytes, LAYOUT[0] + LAYOUT[1] + 4096);
        assert_eq!(sent.zero_bytes, 4096);
        assert_eq!(
            sent.wire_bytes,
            sent.data_bytes + sent.frames * HEADER_LENGTH as u64
        );
        assert!(memory.blocks[0] == guest);
        let mut expected = small.clone();
        expected[4096..8192].copy_from_slice(&guest[..4096]);
        expected[8192..12288].fill(0);
        assert!(memory.blocks[1] == expected);
        assert_eq!(memory.rounds, [1, 2]);
    }
}

#[test]
fn what_can_be_packed_is_and_arrives_as_it_was() {
    for encrypted in [false, true] {
        // Text packs well, noise does not: both kinds of frames go over one stream.
        let mut guest = noise(LAYOUT[0] as usize, 5);
        for (index, page) in guest
            .chunks_mut(64 << 10)
            .enumerate()
            .filter(|(index, _)| index % 3 > 0)
        {
            let text = format!("page {index} of a guest that stores text. ");
            page.iter_mut()
                .zip(text.bytes().cycle())
                .for_each(|(to, from)| *to = from);
        }
        let (sent, received, memory) = transfer(encrypted, |mut sender| {
            sender.pack(1).unwrap();
            for (index, piece) in guest.chunks(256 << 10).enumerate() {
                sender.data(0, (index * (256 << 10)) as u64, piece)?;
            }
            sender.data(1, 0, &guest[64 << 10..68 << 10])?;
            sender.barrier(1)?;
            sender.finish()
        });
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!(sent, received);
        assert_eq!(sent.data_bytes, LAYOUT[0] + 4096);
        assert!(sent.wire_bytes < sent.data_bytes / 2, "{sent}");
        assert!(memory.blocks[0] == guest);
        assert!(memory.blocks[1][..4096] == guest[64 << 10..68 << 10]);
    }
}

#[test]
fn packed_bytes_that_are_not_what_they_say_are_refused() {
    let packed = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let two_pages = packed(&[7; 8192]);
    // A bomb, too little, cut off, and noise: each claims to be one page.
    let payloads = [
        packed(&vec![0; 64 << 20]),
        packed(&[7; 100]),
        two_pages[..two_pages.len() - 1].to_vec(),
        noise(500, 9),
    ];
    for payload in payloads.into_iter().chain([two_pages]) {
        let length = payload.len() as u32;
        let frame = Frame::Packed {
            block: 0,
            offset: 0,
            length,
            span: 4096,
        };
        let (error, answer) = receive(&[&frame.encode(1)[..], &payload].concat());
        let what = Invalid::Packed { length, span: 4096 };
        assert!(
            matches!(error, Error::BadFrame { what: found, .. } if found == what),
            "{error:?}"
        );
        assert_eq!(answer, Frame::Reject(Rejection::Protocol).encode(1));
    }
}

#[test]
fn scattered_pages_and_many_zero_frames_arrive() {
    for encrypted in [false, true] {
        let guest = noise(LAYOUT[0] as usize, 3);
        let pages = guest.len() / 4096;
        let (sent, received, memory) = transfer(encrypted, |mut sender| {
            for number in 0..pages {
                let page = number * 5003 % pages; // 5003 is prime to 12288: each page once
                let at = page * 4096;
                if page.is_multiple_of(2) {
                    sender.data(0, at as u64, &guest[at..at + 4096])?;
                } else {
                    sender.zero(0, at as u64, 4096)?;
                }
            }
            // Nothing but zero frames, more than are collected before a write.
            sender.zero(1, 0, 1 << 20)?;
            for _ in 0..20_000 {
                sender.zero(1, 0, 4096)?;
            }
            sender.finish()
        });
        assert_eq!(sent.unwrap(), received.unwrap());
        for (page, bytes) in memory.blocks[0].chunks(4096).enumerate() {
            let expected = if page.is_multiple_of(2) {
                &guest[page * 4096..][..4096]
            } else {
                &[0; 4096][..]
            };
            assert!(bytes == expected, "page {page}");
        }
        assert!(memory.blocks[1].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn an_empty_stream_is_a_stream() {
    let (sent, received, _) = transfer(true, |sender| sender.finish());
    assert_eq!(sent.unwrap(), received.unwrap());
}

#[test]
fn the_digest_is_that_of_the_bytes_on_the_wire() {
    let (source, mut raw) = raw_receiver(Purpose::Data(0));
    let mut sender = DataSender::new(source, WINDOW);
    let page = noise(4096, 4);
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            sender.data(0, 0, &page)?;
            sender.zero(0, 4096, 4096)?;
            sender.data(0, 8192, &noise(1 << 20, 5))?;
            sender.finish()
        });
        let mut wire = vec![0; 3 * HEADER_LENGTH + 4096 + (1 << 20)];
        raw.read_exact(&mut wire).unwrap();
        let mut end = [0; HEADER_LENGTH + Totals::LENGTH];
        raw.read_exact(&mut end).unwrap();
        let totals = Totals::decode(end.last_chunk().unwrap());
        assert_eq!(totals.digest, xxhash_rust::xxh3::xxh3_128(&wire));
        assert_eq!(totals.wire_bytes, wire.len() as u64);
        raw.write_all(
            &Frame::Ack {
                bytes: totals.wire_bytes,
            }
            .encode(4),
        )
        .unwrap();
        assert_eq!(sending.join().unwrap().unwrap(), totals);
    });
}

#[test]
fn what_no_frame_can_carry_is_not_sent() {
    let (_, received, _) = transfer(false, |mut sender| {
        for (offset, length) in [(0, 0), (0, 100), (100, 4096), (0, (1 << 20) + 1)] {
            let error = sender.data(0, offset, &vec![1; length]).unwrap_err();
            assert!(matches!(error, Error::Unsendable { .. }), "{error:?}");
        }
        assert!(matches!(
            sender.zero(0, 0, 0),
            Err(Error::Unsendable {
                what: Invalid::Span(0)
            })
        ));
        assert!(matches!(
            sender.zero(0, 1, 4096),
            Err(Error::Unsendable {
                what: Invalid::Alignment(1)
            })
        ));
        sender.finish()
    });
    received.unwrap();
}

#[test]
fn a_frame_outside_the_guest_is_rejected_with_the_reason() {
    for encrypted in [false, true] {
        let (sent, received, memory) = transfer(encrypted, |mut sender| {
            sender.data(1, (1 << 20) - 4096, &[1; 8192])?;
            sender.finish()
        });
        let received = received.unwrap_err();
        assert!(
            matches!(
                received,
                Error::BadFrame {
                    what: Invalid::Outside { block: 1, .. },
                    ..
                }
            ),
            "{received:?}"
        );
        let sent = sent.unwrap_err();
        assert!(
            matches!(
                sent,
                Error::Rejected {
                    reason: Rejection::Protocol,
                    ..
                }
            ),
            "{sent:?}"
        );
        assert!(memory.blocks[1].iter().all(|&byte| byte == 0xee));
    }
}

#[test]
fn the_sender_hears_why_memory_could_not_be_written() {
    struct Full;
    impl Apply for Full {
        fn data(&mut self, _: u16, offset: u64, _: &[u8]) -> io::Result<()> {
            match offset {
                0 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(28)),
            }
        }
        fn zero(&mut self, _: u16, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
    }
    for encrypted in [false, true] {
        let (source, destination) = pair(encrypted, Purpose::Data(0));
        thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let mut sender = DataSender::new(source, WINDOW);
                let block = vec![1; 1 << 20];
                // Goes on until it is stopped: it must not need the barrier to hear of it.
                for offset in (0u64..).map(|number| (number % 40) << 20) {
                    if let Err(error) = sender.data(0, offset, &block) {
                        return error;
                    }
                }
                unreachable!()
            });
            let received = DataReceiver::new(destination, &LAYOUT)
                .run(&mut Full)
                .unwrap_err();
            assert!(
                matches!(received, Error::Apply { offset: 0x100000, .. }),
                "{received:?}"
            );
            let sent = sending.join().unwrap();
            assert!(
                matches!(
                    sent,
                    Error::Rejected {
                        reason: Rejection::Apply { errno: 28 },
                        ..
                    }
                ),
                "{sent:?}"
            );
            assert!(sent.to_string().contains("No space left on device"), "{sent}");
        });
    }
}

/// What a receiver says to a sender that writes just these bytes and ends, and its answer on the wire.
fn receive(bytes: &[u8]) -> (Error, Vec<u8>) {
    let (mut raw, destination) = raw_sender(Purpose::Data(0));
    raw.write_all(bytes).unwrap();
    raw.shutdown(Shutdown::Write).unwrap();
    let error = DataReceiver::new(destination, &LAYOUT)
        .run(&mut Memory::new())
        .unwrap_err();
    let mut answer = Vec::new();
    raw.read_to_end(&mut answer).unwrap();
    (error, answer)
}

#[test]
fn gaps_cuts_and_oversizes_are_named() {
    let page = Frame::Data {
        block: 0,
        offset: 0,
        length: 4096,
    };
    let with_page = |sequence| [&page.encode(sequence)[..], &[7; 4096]].concat();

    let (error, answer) = receive(&[with_page(1), with_page(3)].concat());
    assert!(
        matches!(
            error,
            Error::BadFrame {
                what: Invalid::Sequence { expected: 2, got: 3 },
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(answer, Frame::Reject(Rejection::Protocol).encode(1));

    let (error, _) = receive(&page.encode(1)[..20]);
    assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");
    let (error, _) = receive(&with_page(1)[..4000]);
    assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");
    let (error, _) = receive(&with_page(1)); // no End
    assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");

    let oversized = Frame::Data {
        block: 0,
        offset: 0,
        length: 2 << 20,
    }
    .encode(1);
    let (error, answer) = receive(&oversized);
    assert!(
        matches!(
            error,
            Error::BadFrame {
                what: Invalid::Length(0x200000),
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(answer, Frame::Reject(Rejection::Protocol).encode(0));

    let (error, _) = receive(b"GET / HTTP/1.1\r\nHost: destination.example\r\n\r\n");
    assert!(
        matches!(
            error,
            Error::BadFrame {
                what: Invalid::Magic(_),
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_changed_bit_is_found_at_the_end() {
    // A relay between two honest ends that changes one bit of a page.
    let (source, mut near) = raw_receiver(Purpose::Data(0));
    let (mut far, destination) = raw_sender(Purpose::Data(0));
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let mut sender = DataSender::new(source, WINDOW);
            sender.data(0, 0, &[5; 4096])?;
            sender.finish()
        });
        let receiving = scope.spawn(move || {
            DataReceiver::new(destination, &LAYOUT)
                .run(&mut Memory::new())
                .unwrap_err()
        });
        let mut stream = [0; 2 * HEADER_LENGTH + 4096 + Totals::LENGTH];
        near.read_exact(&mut stream).unwrap();
        stream[1000] ^= 1;
        far.write_all(&stream).unwrap();
        let mut answer = [0; HEADER_LENGTH];
        far.read_exact(&mut answer).unwrap();
        near.write_all(&answer).unwrap();
        let sent = sending.join().unwrap().unwrap_err();
        assert!(
            matches!(
                sent,
                Error::Rejected {
                    reason: Rejection::Mismatch,
                    ..
                }
            ),
            "{sent:?}"
        );
        drop(far);
        let received = receiving.join().unwrap();
        match received {
            Error::Mismatch { ours, theirs, .. } => {
                assert_ne!(ours.digest, theirs.digest);
                assert_eq!(ours.frames, theirs.frames);
            }
            other => panic!("{other:?}"),
        }
    });
}

/// Sends until something happens.
fn flood(source: Connection, window: u64) -> (std::sync::Arc<Progress>, thread::JoinHandle<Error>) {
    let mut sender = DataSender::new(source, window);
    let progress = sender.progress();
    let flooding = thread::spawn(move || {
        let block = vec![1; 256 << 10];
        loop {
            if let Err(error) = sender.data(0, 0, &block) {
                return error;
            }
        }
    });
    (progress, flooding)
}

#[test]
fn a_sender_never_exceeds_its_window() {
    let (source, mut raw) = raw_receiver(Purpose::Data(0));
    let breaker = source.breaker();
    let (_, flooding) = flood(source, MIN_WINDOW);
    raw.set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    // Without an acknowledgement exactly as many frames come as fit.
    let frame = HEADER_LENGTH + (256 << 10);
    let fitting = MIN_WINDOW as usize / frame;
    raw.read_exact(&mut vec![0; fitting * frame]).unwrap();
    let more = |raw: &mut TcpStream| {
        raw.set_read_timeout(Some(std::time::Duration::from_millis(300)))
            .unwrap();
        raw.read(&mut [0; 1]).map_err(|error| error.kind())
    };
    assert_eq!(more(&mut raw), Err(io::ErrorKind::WouldBlock));
    // One acknowledged, one more may come, and no second.
    raw.write_all(&Frame::Ack { bytes: frame as u64 }.encode(1))
        .unwrap();
    raw.set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    raw.read_exact(&mut vec![0; frame]).unwrap();
    assert_eq!(more(&mut raw), Err(io::ErrorKind::WouldBlock));
    breaker.break_off();
    let error = flooding.join().unwrap();
    assert!(matches!(error, Error::BrokenOff { .. }), "{error:?}");
}

#[test]
fn impossible_acknowledgements_are_refused() {
    for (bytes, sequence) in [(u64::MAX, 1), (0, u64::MAX), (1 << 40, 3)] {
        let (source, mut raw) = raw_receiver(Purpose::Data(0));
        raw.write_all(&Frame::Ack { bytes }.encode(sequence)).unwrap();
        let mut sender = DataSender::new(source, WINDOW);
        let error = sender
            .data(0, 0, &[1; 4096])
            .and_then(|()| sender.barrier(1))
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::BadFrame {
                    what: Invalid::Acknowledgement { .. },
                    ..
                }
            ),
            "{error:?}"
        );
    }
    let (source, mut raw) = raw_receiver(Purpose::Data(0));
    raw.write_all(&Frame::End.encode(1)).unwrap();
    let error = DataSender::new(source, WINDOW).barrier(1).unwrap_err();
    assert!(
        matches!(
            error,
            Error::BadFrame {
                what: Invalid::Direction,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_receiver_that_dies_ends_the_sender() {
    for encrypted in [false, true] {
        let (source, mut destination) = pair(encrypted, Purpose::Data(0));
        let (_, flooding) = flood(source, WINDOW);
        destination.receive_exact(&mut [0; 100_000], "testing").unwrap();
        drop(destination);
        let error = flooding.join().unwrap();
        assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");
    }
}

#[test]
fn a_sender_that_dies_ends_the_receiver() {
    for encrypted in [false, true] {
        let (sent, received, _) = transfer(encrypted, |mut sender| {
            sender.data(0, 0, &[1; 1 << 20])?;
            sender.barrier(1)?;
            drop(sender);
            Ok(Totals::default())
        });
        sent.unwrap();
        let received = received.unwrap_err();
        assert!(matches!(received, Error::PeerGone { .. }), "{received:?}");
    }
}

#[test]
fn breakers_end_a_waiting_barrier_and_a_waiting_receiver() {
    for encrypted in [false, true] {
        let (source, destination) = pair(encrypted, Purpose::Data(0));
        let mut sender = DataSender::new(source, WINDOW);
        let receiver = DataReceiver::new(destination, &LAYOUT);
        let (near, far) = (sender.breaker(), receiver.breaker());
        thread::scope(|scope| {
            // The receiver does not run yet: the barrier waits.
            let waiting = scope.spawn(move || sender.barrier(1));
            near.break_off();
            let error = waiting.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::BrokenOff { .. }), "{error:?}");
            far.break_off();
            let error = receiver.run(&mut Memory::new()).unwrap_err();
            assert!(matches!(error, Error::BrokenOff { .. }), "{error:?}");
        });
    }
}

#[test]
fn a_barrier_without_an_answer_ends_with_the_patience() {
    let (mut source, _raw) = raw_receiver(Purpose::Data(0));
    source
        .set_patience(std::time::Duration::from_millis(200))
        .unwrap();
    let error = DataSender::new(source, WINDOW).barrier(1).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}
