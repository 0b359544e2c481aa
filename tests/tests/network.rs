//! What the guest's peers on the network see of its move.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{address, usual, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::wait_until;

/// Time between two pings, ms.
const INTERVAL_MS: u64 = 10;
/// For frames that are under way.
const SETTLE: Duration = Duration::from_secs(20);

/// Pings a guest from the switch until stopped.
struct Ping(Option<Child>);

impl Ping {
    fn start(switch: &Host, guest: &str) -> Result<Self> {
        let interval = format!("{:.3}", INTERVAL_MS as f64 / 1000.0);
        // By SIGINT, as from a terminal, ping ends with its summary.
        let child = switch
            .command("timeout")
            .args(["--signal=INT", "100", "ping", "-D", "-i", &interval, guest])
            .stdout(Stdio::piped())
            .spawn()
            .context("ping")?;
        Ok(Ping(Some(child)))
    }

    /// Stops it and returns what it printed.
    fn stop(mut self, switch: &Host) -> Result<String> {
        let child = self.0.take().context("ping was stopped already")?;
        for ping in switch.processes_named("ping")? {
            Command::new("kill")
                .args(["-INT", &ping.pid.to_string()])
                .status()?;
        }
        let output = child.wait_with_output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// When each answer came (seconds) and its number.
fn answers(output: &str) -> Vec<(f64, u64)> {
    let parse = |line: &str| {
        let time = line.strip_prefix('[')?.split_once(']')?.0.parse().ok()?;
        let number = line.split_once("icmp_seq=")?.1.split(' ').next()?.parse().ok()?;
        Some((time, number))
    };
    output.lines().filter_map(parse).collect()
}

/// The port of the switch behind which it has last seen this address.
fn port_of(switch: &Host, mac: &str) -> Result<Option<String>> {
    let table = switch.run(&["bridge", "fdb", "show", "br", "switch0"])?;
    Ok(table.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [address, "dev", port, ..] if address == mac => Some(port.to_owned()),
            _ => None,
        }
    }))
}

/// The address of the guest's NIC, as libvirt knows it.
fn mac_of(host: &Host, guest: &str) -> Result<String> {
    let list = host.virsh(&["domiflist", guest])?;
    list.split_whitespace()
        .find(|word| word.starts_with("52:54:00"))
        .map(str::to_owned)
        .context("the guest has no NIC")
}

/// How long the guest that last left this host stood still by virt-ferry's account, ms.
fn stood_still(from: &Host) -> Result<f64> {
    let downtime = from.last_timeline(Role::Source)?.downtime;
    Ok(downtime.context("the timeline has no downtime")?.total_ms)
}

#[test]
fn pings_are_answered_through_the_move() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two, switch) = (lab.host(1), lab.host(2), lab.switch());
        // Without a heartbeat the guest says nothing that it is not asked, and whoever asks it does so at its old place
        // until the new one has been announced.
        let scene = Scene::start(lab, one, usual("pinged").beat_us(0), 1)?;
        let mac = mac_of(one, scene.name())?;
        ensure!(port_of(switch, &mac)?.as_deref() == Some(one.name()));
        for (from, to) in [(one, two), (two, one)] {
            let ping = Ping::start(switch, &address(1).ip.to_string())?;
            from.migrate(scene.name(), to, &[])?;
            wait_until("the switch to learn the guest's new place", SETTLE, || {
                Ok(port_of(switch, &mac)?.as_deref() == Some(to.name()))
            })?;
            scene.lives_on(to)?;
            let answers = answers(&ping.stop(switch)?);
            let (_, last) = *answers.last().context("no ping was answered")?;
            let lost = last + 1 - answers.len() as u64;
            let silence = answers
                .windows(2)
                .map(|pair| pair[1].0 - pair[0].0)
                .fold(0.0, f64::max);
            let stood_still = stood_still(from)?;
            println!(
                "{} to {}: {lost} of {last} pings lost, longest silence {:.0} ms; the guest stood still {stood_still:.1} ms",
                from.name(),
                to.name(),
                silence * 1000.0
            );
            // Pings while the guest stood still, and as many again while the switch did not know of its new place.
            let few = 20 + 2 * stood_still as u64 / INTERVAL_MS;
            ensure!(lost <= few, "{lost} pings lost, more than {few}");
        }
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}

#[test]
fn the_heartbeat_goes_on() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("heard"), 1)?;
        let listener = lab.witness()?;
        let ip = address(1).ip;
        for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p"])] {
            listener.reset();
            listener.wait(ip, 200, PATIENCE)?;
            from.migrate(scene.name(), to, options)?;
            let arrived = listener.heard(ip);
            let heard = listener.wait(ip, arrived.received + 200, PATIENCE)?;
            println!(
                "{} to {}: silent for {:.1} ms, {} of {} heartbeats not heard; the guest stood still {:.1} ms",
                from.name(),
                to.name(),
                heard.longest.length.as_secs_f64() * 1000.0,
                heard.missing,
                heard.received + heard.missing,
                stood_still(from)?
            );
            // A guest that ran in two places, or went on from an earlier state, would say numbers again.
            ensure!(
                heard.repeated == 0,
                "{} heartbeats were said again",
                heard.repeated
            );
            scene.lives_on(to)?;
        }
        Ok(())
    })
}
