//! Peer-to-peer as OpenStack Nova and oVirt's VDSM drive it, by libvirt-python: the guest moves, they see sensible progress
//! meanwhile, and find the guest defined where they look for it afterwards.

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::Scene;
use serde_json::{Map, Value};

/// A guest that takes a few seconds over the slowed link, at 100 MB/s.
const RAM_MIB: u64 = 1024;
const FILLED_MIB: u64 = 500;
const MBIT: u32 = 800;

/// VIR_DOMAIN_JOB_UNBOUNDED and _COMPLETED (libvirt-domain.h).
const RUNNING: u64 = 2;
const COMPLETED: u64 = 3;

/// What Nova's JobInfo takes from jobStats of a migration that copies memory.
const NOVAS_FIELDS: [&str; 16] = [
    "type",
    "time_elapsed",
    "data_total",
    "data_processed",
    "data_remaining",
    "memory_total",
    "memory_processed",
    "memory_remaining",
    "memory_iteration",
    "memory_constant",
    "memory_normal",
    "memory_normal_bytes",
    "memory_bps",
    "disk_total",
    "disk_processed",
    "disk_remaining",
];

/// What VDSM's Progress takes; it looks at the operation first.
const VDSMS_FIELDS: [&str; 11] = [
    "type",
    "operation",
    "time_elapsed",
    "data_total",
    "data_processed",
    "data_remaining",
    "memory_total",
    "memory_processed",
    "memory_remaining",
    "memory_bps",
    "memory_iteration",
];

/// A client of libvirt's: its name, its part as a script, and the figures it takes from jobStats.
struct Client<'a> {
    name: &'a str,
    script: &'a str,
    fields: &'a [&'a str],
}

const NOVA: Client = Client {
    name: "nova",
    script: include_str!("openstack/nova.py"),
    fields: &NOVAS_FIELDS,
};

const VDSM: Client = Client {
    name: "vdsm",
    script: include_str!("openstack/vdsm.py"),
    fields: &VDSMS_FIELDS,
};

/// One look at the job.
struct Poll(Map<String, Value>);

impl Poll {
    fn figure(&self, name: &str) -> u64 {
        self.0.get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Whether memory is being copied.
    fn is_copying(&self) -> bool {
        self.figure("type") == RUNNING && self.figure("memory_total") > 0
    }
}

/// Runs the client's part on `from`, which must succeed; returns what it saw while the guest moved.
fn moved_by(client: &Client, lab: &Lab, from: &Host, guest: &str, to: &Host) -> Result<Vec<Poll>> {
    let name = client.name;
    let script = format!("{name}.py");
    std::fs::write(lab.share().join(&script), client.script)?;
    let (script, uri) = (format!("/lab/{script}"), to.uri());
    let migrate_uri = format!("tcp://{}", to.name());
    let mut command = vec!["/usr/bin/python3", &script, guest, &uri, &migrate_uri];
    if name == VDSM.name {
        command.push(to.name());
    }
    let said = from.run(&command)?;
    let mut said: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    ensure!(said["error"].is_null(), "migrateToURI3: {}", said["error"]);
    ensure!(
        said["after"]["type"].as_u64() == Some(COMPLETED),
        "{name} would not see that the guest has moved: {}",
        said["after"]
    );
    let Value::Array(polls) = said["polls"].take() else {
        anyhow::bail!("no polls");
    };
    Ok(polls
        .into_iter()
        .filter_map(|poll| match poll {
            Value::Object(fields) => Some(Poll(fields)),
            _ => None,
        })
        .collect())
}

fn judge(client: &Client, polls: &[Poll]) -> Result<()> {
    let copying: Vec<&Poll> = polls.iter().filter(|poll| poll.is_copying()).collect();
    ensure!(
        copying.len() >= 5,
        "only {} of {} polls saw the guest being copied",
        copying.len(),
        polls.len()
    );
    for poll in &copying {
        for field in client.fields {
            ensure!(poll.0.contains_key(*field), "no {field} in {:?}", poll.0);
        }
        for kind in ["memory", "data"] {
            let [total, processed, remaining] =
                ["total", "processed", "remaining"].map(|part| poll.figure(&format!("{kind}_{part}")));
            ensure!(
                total >= RAM_MIB << 20,
                "{kind}_total is {total}, less than the guest's memory"
            );
            ensure!(
                processed <= total && remaining <= total,
                "{kind}: {processed} done and {remaining} left of {total}"
            );
        }
    }
    let remaining: Vec<u64> = copying
        .iter()
        .map(|poll| poll.figure("memory_remaining"))
        .collect();
    let (first, last) = (remaining[0], remaining[remaining.len() - 1]);
    ensure!(
        first > (FILLED_MIB << 20) / 2 && last < first / 4,
        "what remains does not shrink to little: {remaining:?}"
    );
    let first_pass = copying
        .windows(2)
        .filter(|pair| pair[1].figure("memory_iteration") <= 1);
    for pair in first_pass {
        ensure!(
            pair[1].figure("memory_remaining") <= pair[0].figure("memory_remaining")
                && pair[1].figure("memory_normal_bytes") >= pair[0].figure("memory_normal_bytes"),
            "the first pass goes backwards: {:?}, then {:?}",
            pair[0].0,
            pair[1].0
        );
    }
    let time: Vec<u64> = copying.iter().map(|poll| poll.figure("time_elapsed")).collect();
    ensure!(time.is_sorted(), "time_elapsed goes backwards: {time:?}");
    Ok(())
}

#[test]
fn nova_and_vdsm_move_a_guest_and_see_it_move() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guest = Guest::linux("nova")
            .memory_mib(RAM_MIB)
            .filled(FILLED_MIB)
            .working_set(16)
            .rate(Rate::mib(4));
        let scene = Scene::start(lab, one, guest, 1)?;
        one.make_persistent(scene.name())?;
        let slow = Slow::to(lab, two, MBIT)?;
        let polls = moved_by(&NOVA, lab, one, scene.name(), two)?;
        drop(slow);
        scene.lives_on(two)?;
        one.assert_moved_away(1)?;
        judge(&NOVA, &polls)?;
        ensure!(
            one.state(scene.name())?.is_none(),
            "the guest is still defined on host1"
        );
        ensure!(
            two.is_persistent(scene.name())?,
            "the guest is not defined on host2"
        );

        // Its own bandwidth is VDSM's limit.
        let polls = moved_by(&VDSM, lab, two, scene.name(), one)?;
        scene.lives_on(one)?;
        two.assert_moved_away(1)?;
        judge(&VDSM, &polls)?;
        ensure!(
            one.is_persistent(scene.name())?,
            "the guest is not defined on host1"
        );
        two.virsh(&["undefine", scene.name()])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}
