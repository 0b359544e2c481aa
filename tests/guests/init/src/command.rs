//! Commands: a word a line, over UDP or the serial console.
//!
//! | command | what it does | answer |
//! |---|---|---|
//! | `check [ID]` | checks all memory now | a verdict line |
//! | `status` | | the status line |
//! | `rate N`, `NM`, `max` | changes the writer's rate | `ok` |
//! | `set MIB` | changes the working set, within the memory the guest began with | `ok` |
//! | `spend MIB [ID]` | takes so much memory, writes to each page of it and frees it, as a program that comes and goes; once only for an ID | `ok` |
//! | `reset` | begins the measurement of stalls and lost time anew; errors stay | `ok` |
//! | `quit` | powers off | `ok` |
//!
//! The answer goes to who asked; a verdict is said on the serial console, too.

use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ferry_guest::config::{COMMAND_PORT, PAGES_PER_MIB};
use ferry_guest::line::{Verdict, PREFIX};
use ferry_guest::page::PAGE_SIZE;
use nix::sys::termios::{self, LocalFlags, SetArg};

use crate::report::{say, status};
use crate::{boot, clock, Guest};

/// Carries a command out; the answer is without the prefix that all lines have.
fn carry_out(guest: &Guest, command: &str) -> Result<String, String> {
    let mut words = command.split_whitespace();
    let (verb, argument) = (words.next().unwrap_or_default(), words.next());
    let missing = || format!("{verb}: needs a value");
    match verb {
        "check" => Ok(check(guest, argument.unwrap_or("-")).to_string()),
        "status" => Ok(status(guest, 0, guest.report.stall.load(Ordering::Relaxed)).to_string()),
        "rate" => {
            guest.load.change_rate(argument.ok_or_else(missing)?.parse()?);
            Ok("ok".to_owned())
        }
        "set" => {
            let pages = pages_of(verb, argument.ok_or_else(missing)?)?;
            if pages > guest.area.pages() {
                return Err(format!(
                    "set: the guest has {} MiB",
                    guest.area.pages() / PAGES_PER_MIB
                ));
            }
            guest.load.change_set(pages);
            Ok("ok".to_owned())
        }
        "spend" => {
            let pages = pages_of(verb, argument.ok_or_else(missing)?)?;
            spend(pages, words.next().unwrap_or("-"))?;
            Ok("ok".to_owned())
        }
        "reset" => {
            guest.report.reset();
            Ok("ok".to_owned())
        }
        "quit" => Ok("ok".to_owned()),
        other => Err(format!(
            "'{other}': unknown; say check, status, rate, set, spend, reset or quit"
        )),
    }
}

/// The pages of an argument in MiB.
fn pages_of(verb: &str, mib: &str) -> Result<u64, String> {
    let mib: u64 = mib.parse().map_err(|_| format!("{verb}: say a number of MiB"))?;
    Ok(mib.saturating_mul(PAGES_PER_MIB))
}

/// Takes memory, puts something into each page of it, and gives it back to the kernel. Who has not yet heard of it asks
/// again with the same ID.
fn spend(pages: u64, id: &str) -> Result<(), String> {
    static LAST: Mutex<String> = Mutex::new(String::new());
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if *last == id {
        return Ok(());
    }
    boot::require_memory(pages)?;
    let mut memory = vec![0u8; pages as usize * PAGE_SIZE];
    for page in memory.chunks_exact_mut(PAGE_SIZE) {
        page[0] = 0xff;
    }
    // A store that nobody reads might be left out.
    std::hint::black_box(&memory);
    id.clone_into(&mut last);
    Ok(())
}

/// One complete pass over memory and landed disk blocks.
fn check(guest: &Guest, id: &str) -> Verdict {
    let begun = clock::monotonic();
    guest.area.check_all();
    let landed = guest.landing.as_ref().map_or(0, |landing| landing.check_all());
    Verdict {
        id: id.to_owned(),
        pages: guest.area.pages() + landed,
        seq: guest.area.sequence(),
        errors: guest.report.errors.load(Ordering::Relaxed),
        ms: (clock::monotonic() - begun).as_millis() as u64,
    }
}

/// Carries out, makes the answer a line, and says verdicts on the console.
fn answer(guest: &Guest, command: &str) -> String {
    let words = carry_out(guest, command).unwrap_or_else(|reason| format!("refused {reason}"));
    let words = words.trim_start_matches(PREFIX);
    if words.starts_with("verdict") {
        say(format_args!("{words}"));
    }
    format!("{PREFIX}{words}")
}

fn ends(command: &str) -> bool {
    command.trim() == "quit"
}

/// Answers datagrams, one command each, for ever.
pub fn serve_udp(guest: &Guest) {
    let socket = match UdpSocket::bind(("0.0.0.0", COMMAND_PORT)) {
        Ok(socket) => socket,
        Err(error) => return say(format_args!("fatal no socket for commands: {error}")),
    };
    let mut buffer = [0; 512];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let command = String::from_utf8_lossy(&buffer[..length]).into_owned();
        // Who asked may be gone.
        let _ = socket.send_to(answer(guest, &command).as_bytes(), from);
        if ends(&command) {
            // The answer leaves the NIC before the machine does.
            thread::sleep(Duration::from_millis(100));
            boot::power_off();
        }
    }
}

/// Stops the console's echo, so that the log holds only what the guest says, line by line.
pub fn silence_echo() -> Result<(), String> {
    let failed = |errno| format!("cannot set the console up: {errno}");
    let console = std::io::stdin();
    let mut terminal = termios::tcgetattr(&console).map_err(failed)?;
    terminal.local_flags.remove(LocalFlags::ECHO);
    termios::tcsetattr(&console, SetArg::TCSANOW, &terminal).map_err(failed)
}

/// Answers lines typed at the console, for ever. Verdicts are said there in any case.
pub fn serve_serial(guest: &Guest) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        if line.trim().is_empty() {
            continue;
        }
        let answer = answer(guest, &line);
        let words = answer.trim_start_matches(PREFIX);
        if !words.starts_with("verdict") {
            say(format_args!("{words}"));
        }
        if ends(&line) {
            boot::power_off();
        }
    }
}
