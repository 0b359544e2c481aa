//! Other programs of this host's, bounded in time and output: one that the storage holds up holds nobody else up.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

/// The most that is read of either output, in bytes: qemu-img has some KiB to say of each layer and snapshot.
const MAX_OUTPUT: u64 = 16 << 20;
/// For one that was killed to be gone.
const GONE: Duration = Duration::from_secs(5);

/// Runs a program without input, in a process group of its own, and returns what it writes on standard output.
///
/// # Errors
/// That it cannot be started or takes longer than `limit`; what it writes on standard error, or how it ended.
pub fn run(command: &mut Command, limit: Duration) -> Result<Vec<u8>, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    // The daemon has files open that it relies on being closed in a child, guests' network devices among them, and does
    // that itself in its own (libvirt 11.3, virCommandMassClose). An engine does it as it starts.
    // SAFETY: between fork and exec of a process with threads: one system call.
    unsafe { command.pre_exec(close_others) };
    let mut child = command
        .spawn()
        .map_err(|error| format!("{program} cannot be started: {error}"))?;
    let why = match hear_out(&mut child, Instant::now() + limit) {
        Ok(Some(Heard { status, told, .. })) if status.success() => return Ok(told),
        Ok(Some(Heard { status, said, .. })) => {
            let said = String::from_utf8_lossy(&said);
            return Err(match said.trim() {
                "" => format!("{program}: {status}"),
                said => said.to_owned(),
            });
        }
        Ok(None) => format!("{program} has not ended within {} s", limit.as_secs()),
        Err(error) => format!("{program} cannot be listened to: {error}"),
    };
    let _ = child.kill();
    // One in the hands of a storage that hangs does not even die, and is not waited for.
    let _ = wait(&mut child, GONE);
    Err(why)
}

/// Waits for a child whose end is near, as its closed outputs tell: a child has no file descriptor to wait on, so a short
/// poll does. `None` where it has not ended within the limit.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if left(deadline).is_zero() {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Has all files but standard input, output and error closed by the exec to come.
fn close_others() -> io::Result<()> {
    // SAFETY: close_range(2) takes integers and touches no memory. A kernel before 5.11 refuses, and they stay open.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Ok(())
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// All there is to know of a program that has ended.
struct Heard {
    status: ExitStatus,
    told: Vec<u8>,
    said: Vec<u8>,
}

/// `None` where it takes longer.
fn hear_out(child: &mut Child, deadline: Instant) -> io::Result<Option<Heard>> {
    let (told, said) = (listen(child.stdout.take())?, listen(child.stderr.take())?);
    let heard = |output: Receiver<_>| output.recv_timeout(left(deadline)).ok();
    let (Some(told), Some(said)) = (heard(told), heard(said)) else {
        return Ok(None);
    };
    let status = wait(child, left(deadline));
    let (told, said) = (told?, said?);
    Ok(status.map(|status| Heard { status, told, said }))
}

/// Reads an output to its end on a thread of its own: neither output holds up the other, nor any of them who waits for it.
fn listen(output: Option<impl Read + Send + 'static>) -> io::Result<Receiver<io::Result<Vec<u8>>>> {
    let (sender, receiver) = channel();
    std::thread::Builder::new()
        .name("ferry-program".into())
        .spawn(move || {
            let mut heard = Vec::new();
            let read = output.map_or(Ok(0), |output| output.take(MAX_OUTPUT).read_to_end(&mut heard));
            // Nobody may be waiting any more.
            let _ = sender.send(read.map(|_| heard));
        })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn shell(script: &str, limit: Duration) -> Result<String, String> {
        let told = run(Command::new("sh").args(["-c", script]), limit)?;
        Ok(String::from_utf8(told).unwrap())
    }

    #[test]
    fn a_program_is_heard_out() {
        let limit = Duration::from_secs(60);
        // More than a pipe holds, on both.
        let much = "head -c 300000 /dev/zero >&2; head -c 300000 /dev/zero | tr '\\0' x";
        assert_eq!(shell(much, limit), Ok("x".repeat(300_000)));
        assert_eq!(shell("cat", limit).as_deref(), Ok(""));
        assert_eq!(
            shell("echo no; echo ' why' >&2; exit 3", limit),
            Err("why".into())
        );
        assert_eq!(shell("exit 3", limit), Err("sh: exit status: 3".into()));
        let missing = run(&mut Command::new("/no/such/program"), limit).unwrap_err();
        assert!(missing.starts_with("/no/such/program cannot be started: No such file"));
    }

    #[test]
    fn nothing_is_waited_for_longer_than_it_may_take() {
        let began = Instant::now();
        for script in ["exec sleep 1000", "exec sleep 1000 >&- 2>&-"] {
            let why = shell(script, Duration::from_millis(100)).unwrap_err();
            assert_eq!(why, "sh has not ended within 0 s");
        }
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn what_the_daemon_has_open_stays_with_it() {
        // Without O_CLOEXEC, as libvirt opens a guest's network devices.
        let (tap, _other) = nix::unistd::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", tap.as_raw_fd());
        let limit = Duration::from_secs(60);
        let there = |path: &str| run(Command::new("test").args(["-e", path]), limit).is_ok();
        assert!(std::fs::exists(&path).unwrap() && there("/proc/self/fd/1") && !there(&path));
    }
}
