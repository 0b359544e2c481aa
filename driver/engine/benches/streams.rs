//! How fast a data stream is here: plain and encrypted, one stream and two, large frames and scattered pages.
//!
//! ```text
//! cargo bench -p ferry-engine --bench streams [-- rounds [MiB]]
//! ```
//! The receiver writes into warm memory. Each line gives the median and the best of the rounds, in GB/s (10^9), and
//! the least processor time both sides took together, in seconds a GB: that one holds on a busy machine too.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ferry_engine::wire::data::WINDOW;
use ferry_engine::wire::{
    connect, Apply, Connection, DataReceiver, DataSender, Identity, Listener, Protection, Purpose, Security,
    Token,
};
use uuid::Uuid;

/// A guest's memory, one block.
struct Memory(Vec<u8>);

impl Apply for Memory {
    fn data(&mut self, _block: u16, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let offset = offset as usize;
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, _block: u16, offset: u64, span: u64) -> std::io::Result<()> {
        let offset = offset as usize;
        self.0[offset..offset + span as usize].fill(0);
        Ok(())
    }
}

fn securities(encrypted: bool) -> Result<(Security, Security)> {
    let (session, token) = (Uuid::new_v4(), Token::generate()?);
    let (source, destination) = (Identity::generate(session)?, Identity::generate(session)?);
    let security = |own: &Identity, peer: &Identity| Security {
        session,
        token: token.clone(),
        protection: match encrypted {
            true => Protection::Encrypted {
                identity: own.clone(),
                peer: peer.certificate().into(),
            },
            false => Protection::Plain,
        },
    };
    Ok((security(&source, &destination), security(&destination, &source)))
}

fn pairs(encrypted: bool, count: u16) -> Result<Vec<(Connection, Connection)>> {
    let (source, destination) = securities(encrypted)?;
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0..=0)?;
    let address = [listener.address()];
    let deadline = Instant::now() + Duration::from_secs(10);
    (0..count)
        .map(|stream| {
            thread::scope(|scope| {
                let connecting = scope.spawn(|| connect(&address, &source, Purpose::Data(stream), deadline));
                let (_, accepted) = listener.accept(&destination, deadline)?;
                Ok((
                    connecting.join().expect("the connecting thread panicked")?,
                    accepted,
                ))
            })
        })
        .collect()
}

/// Processor time of this process until now, seconds (proc_pid_stat(5): utime and stime in ticks of 10 ms).
fn processor_time() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat
        .rsplit_once(") ")
        .context("no command name in /proc/self/stat")?;
    let ticks: Vec<u64> = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}

/// Sends each guest over a stream of its own in frames of `frame` bytes, pages scattered, larger ones in order.
/// Returns the seconds it took, by the clock and of processor time.
fn run(encrypted: bool, guests: &[Vec<u8>], memories: &mut [Memory], frame: usize) -> Result<(f64, f64)> {
    let pairs = pairs(encrypted, guests.len() as u16)?;
    let (began, used) = (Instant::now(), processor_time()?);
    thread::scope(|scope| {
        let mut streams = Vec::new();
        for (((source, destination), guest), memory) in pairs.into_iter().zip(guests).zip(memories) {
            streams.push(scope.spawn(move || {
                let layout = [guest.len() as u64];
                DataReceiver::new(destination, &layout).run(memory)
            }));
            streams.push(scope.spawn(move || {
                let mut sender = DataSender::new(source, WINDOW);
                let frames = guest.len() / frame;
                for number in 0..frames {
                    // Scattered: a stride that is prime to the number of frames visits each once.
                    let at = if frame == 4096 {
                        number * 7919 % frames * frame
                    } else {
                        number * frame
                    };
                    sender.data(0, at as u64, &guest[at..at + frame])?;
                }
                sender.barrier(1)?;
                sender.finish()
            }));
        }
        streams.into_iter().try_for_each(|stream| {
            stream
                .join()
                .expect("a stream's thread panicked")
                .map(drop)
                .context("a stream failed")
        })
    })?;
    Ok((began.elapsed().as_secs_f64(), processor_time()? - used))
}

fn main() -> Result<()> {
    // cargo adds its own --bench.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let mib: usize = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    println!(
        "{:<46} median   best  CPU s/GB",
        format!("{mib} MiB, {rounds} rounds")
    );
    for streams in [1usize, 2] {
        let length = (mib << 20) / streams;
        let noise = |seed: u64| {
            let mut state = seed;
            let mut next = || {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (state >> 32) as u8
            };
            (0..length).map(|_| next()).collect::<Vec<u8>>()
        };
        let guests: Vec<_> = (0..streams as u64).map(noise).collect();
        let mut memories: Vec<_> = (0..streams).map(|_| Memory(vec![1; length])).collect();
        for (encrypted, name) in [(false, "plain"), (true, "TLS")] {
            for (frame, what) in [
                (256 << 10, "256 KiB frames"),
                (1 << 20, "1 MiB frames"),
                (4096, "scattered 4 KiB pages"),
            ] {
                let gigabytes = (length * streams) as f64 / 1e9;
                let mut speeds = Vec::new();
                let mut cost = f64::INFINITY;
                for _ in 0..rounds {
                    let (seconds, processor) = run(encrypted, &guests, &mut memories, frame)?;
                    speeds.push(gigabytes / seconds);
                    cost = cost.min(processor / gigabytes);
                }
                speeds.sort_by(f64::total_cmp);
                let line = format!("{name}, {streams} stream(s), {what}");
                println!(
                    "{line:<46} {:>6.2} {:>6.2} {cost:>8.2}",
                    speeds[rounds / 2],
                    speeds[rounds - 1]
                );
            }
        }
        for (guest, memory) in guests.iter().zip(&memories) {
            anyhow::ensure!(
                *guest == memory.0,
                "the memory that arrived is not the one that was sent"
            );
        }
    }
    Ok(())
}
