//! Pictures of migrations of every kind. `FERRY_PICTURES=<directory>` keeps them, to be looked at.

use ferry_contract::stage::Stage;

use super::*;
use crate::report::timeline::{
    tests::migration, Downtime, Event, Guest, Migration, Ram, Recorder, Role, Round, StageSpan, Totals,
};

fn spans(ends: &[(Stage, f64)]) -> Vec<StageSpan> {
    let mut begin_ms = 0.0;
    let mut spans = Vec::new();
    for &(stage, end_ms) in ends {
        spans.push(StageSpan {
            stage,
            begin_ms,
            end_ms,
        });
        begin_ms = end_ms;
    }
    spans
}

fn blank(name: &str) -> Timeline {
    Timeline {
        started: "2026-11-22T21:17:03.512Z".into(),
        total_ms: 0.0,
        ..Recorder::new(migration(name)).finish(Outcome::Completed)
    }
}

/// Five rounds, 400 ms, 9 ms of downtime.
fn short() -> Timeline {
    let mut rounds = Vec::new();
    let mut begin_ms = 41.2;
    for (number, (send_ms, pages, rate)) in [
        (260.0, 59_400, 0.0),
        (31.0, 7200, 27_500.0),
        (6.1, 1240, 38_000.0),
        (2.2, 310, 41_000.0),
        (1.6, 127, 33_000.0),
    ]
    .into_iter()
    .enumerate()
    {
        let round = Round {
            number: number as u32,
            begin_ms,
            scan_ms: 0.9,
            drain_ms: 0.3,
            send_ms,
            pages,
            data_bytes: pages * 4096,
            zero_bytes: if number == 0 { 40 << 20 } else { 64 << 10 },
            dirty_rate: rate,
            ..Round::default()
        };
        begin_ms += round.ms();
        rounds.push(round);
    }
    Timeline {
        total_ms: 399.412,
        ram: Ram {
            blocks: 1,
            bytes: 512 << 20,
            resident: 272 << 20,
        },
        stages: spans(&[
            (Stage::PreMigration, 3.1),
            (Stage::Reservation, 41.2),
            (Stage::PreCopy, 352.0),
            (Stage::StopAndCopy, 360.4),
            (Stage::Commitment, 361.2),
            (Stage::Activation, 399.412),
        ]),
        rounds,
        downtime: Some(Downtime {
            total_ms: 9.124,
            stop_ms: 1.204,
            last_copy_ms: 3.911,
            device_state_ms: 3.102,
            resume_ms: 0.907,
            last_copy_pages: 92,
            last_copy_bytes: 92 * 4096,
        }),
        totals: Totals {
            frames: 4711,
            data_bytes: 68_369 * 4096,
            zero_bytes: 40 << 20,
            wire_bytes: 68_369 * 4096 + 4711 * 40,
            digest: Some("9f3c1a77e20b45d1".into()),
        },
        ..blank("web-01")
    }
}

/// Forty rounds, five minutes.
fn long() -> Timeline {
    let mut rounds = Vec::new();
    let mut begin_ms = 620.0;
    let mut pages = 8_100_000u64;
    for number in 0..40u32 {
        let send_ms = pages as f64 * 4096.0 / 118e6 * 1000.0 / 4.2;
        let round = Round {
            number,
            begin_ms,
            scan_ms: 34.0,
            drain_ms: 1.8,
            send_ms,
            pages,
            data_bytes: pages * 4096 * 9 / 10,
            zero_bytes: pages * 4096 / 10,
            deferred_pages: u64::from(number) * 40,
            dirty_rate: if number == 0 {
                0.0
            } else {
                17_000.0 + 9000.0 * f64::from(number % 7)
            },
            ..Round::default()
        };
        begin_ms += round.ms();
        pages = match number {
            0..12 => pages * 7 / 10,
            _ => 30_000 + u64::from(number * 7919 % 83) * 2100,
        };
        rounds.push(round);
    }
    let name = "db-cluster-primary-with-a-rather-long-name.production.example.org";
    Timeline {
        migration: Migration {
            role: Role::Destination,
            local_host: "compute-0117.rack42.dc-north.example.org".into(),
            peer_host: "compute-0042.rack07.dc-south.example.org".into(),
            ..migration(name)
        },
        total_ms: begin_ms + 700.0,
        ram: Ram {
            blocks: 4,
            bytes: 64 << 30,
            resident: 31 << 30,
        },
        stages: spans(&[
            (Stage::PreMigration, 22.0),
            (Stage::Reservation, 620.0),
            (Stage::PreCopy, begin_ms),
            (Stage::StopAndCopy, begin_ms + 188.0),
            (Stage::Commitment, begin_ms + 190.0),
            (Stage::Activation, begin_ms + 700.0),
        ]),
        rounds,
        downtime: Some(Downtime {
            total_ms: 214.0,
            stop_ms: 3.0,
            last_copy_ms: 171.0,
            device_state_ms: 14.0,
            resume_ms: 0.0,
            last_copy_pages: 38_000,
            last_copy_bytes: 38_000 * 4096,
        }),
        totals: Totals {
            frames: 812_331,
            data_bytes: 97 << 30,
            zero_bytes: 9 << 30,
            wire_bytes: 98 << 30,
            digest: Some("c1".repeat(32)),
        },
        events: (0..9)
            .map(|n| Event {
                at_ms: 31_000.0 * f64::from(n + 1),
                text: format!(
                    "the guest does not converge: it writes 41.{n} k pages/s, the streams carry 120 k"
                ),
            })
            .collect(),
        ..blank(name)
    }
}

fn failed() -> Timeline {
    let mut timeline = short();
    timeline.total_ms = 287.03;
    timeline.stages = spans(&[
        (Stage::PreMigration, 3.1),
        (Stage::Reservation, 41.2),
        (Stage::PreCopy, 287.03),
    ]);
    timeline.rounds.truncate(1);
    timeline.downtime = None;
    timeline.totals.digest = None;
    timeline.events = vec![Event {
        at_ms: 201.0,
        text: "stream 2 was cut off, connecting again".into(),
    }];
    timeline.outcome = Outcome::Failed {
        stage: Some(Stage::PreCopy),
        error: "kvm-b did not answer for 30 s (connection timed out on stream 2, 10.0.0.2 port 49152). The guest runs \
                on at kvm-a. Check the network between the hosts and the firewall on kvm-b, then migrate again."
            .into(),
    };
    timeline
}

fn hostile() -> Timeline {
    let name = "<script>alert('1')</script>&amp;\u{202e}\u{0}\n漢字漢字漢字 \u{1b}[31m".repeat(3);
    let mut timeline = short();
    timeline.migration.guest = Guest {
        name: name.clone(),
        ..timeline.migration.guest
    };
    timeline.migration.peer_host = "]]><svg onload=x>".into();
    timeline.migration.encryption = Some("W".repeat(3000));
    timeline.started = "never".repeat(500);
    timeline.total_ms = f64::MAX;
    timeline.stages[2] = StageSpan {
        stage: Stage::PreCopy,
        begin_ms: f64::NAN,
        end_ms: f64::NEG_INFINITY,
    };
    timeline.stages[3].begin_ms = 1e300;
    for (n, round) in timeline.rounds.iter_mut().enumerate() {
        round.begin_ms = -1e300;
        round.data_bytes = u64::MAX >> (n * 13);
        round.zero_bytes = u64::MAX;
        round.dirty_rate = [f64::NAN, f64::INFINITY, -5.0, 1e-300, f64::MAX][n];
    }
    timeline.downtime = Some(Downtime {
        total_ms: -3.0,
        stop_ms: f64::INFINITY,
        last_copy_ms: f64::NAN,
        last_copy_pages: u64::MAX,
        last_copy_bytes: u64::MAX,
        ..Downtime::default()
    });
    timeline.totals.frames = u64::MAX;
    timeline.totals.digest = Some("</text>".repeat(100));
    timeline.events = vec![
        Event {
            at_ms: f64::NAN,
            text: name.clone()
        };
        10
    ];
    timeline.outcome = Outcome::Failed {
        stage: None,
        error: name.repeat(20),
    };
    timeline
}

fn all() -> Vec<(&'static str, Timeline)> {
    let mut many = long();
    many.rounds = (0..4000)
        .map(|number| Round {
            number,
            ..many.rounds[number as usize % 40]
        })
        .collect();
    many.omitted = 90_000;
    let mut early = blank("web-01");
    early.outcome = Outcome::Failed {
        stage: None,
        error: "no tmpfs on /var/lib/libvirt/qemu/ram at kvm-b".into(),
    };
    let mut one = short();
    one.rounds.truncate(1);
    let mut cancelled = long();
    cancelled.outcome = Outcome::Cancelled;
    cancelled.downtime = None;
    cancelled.stages.truncate(3);
    let mut idle = short();
    idle.rounds = vec![
        Round::default(),
        Round {
            number: 1,
            ..Round::default()
        },
    ];
    vec![
        ("short", short()),
        ("long", long()),
        ("failed", failed()),
        ("hostile", hostile()),
        ("many", many),
        ("early", early),
        ("one", one),
        ("cancelled", cancelled),
        ("idle", idle),
    ]
}

#[test]
fn every_picture_is_well_formed_and_finite() {
    for (name, timeline) in all() {
        let svg = render(&timeline);
        if let Some(dir) = std::env::var_os("FERRY_PICTURES") {
            std::fs::write(std::path::Path::new(&dir).join(format!("{name}.svg")), &svg).unwrap();
        }
        assert_well_formed(name, &svg);
        for nonsense in ["NaN", "inf", "-0.0\"", "<script", "onload=x>"] {
            let shown = svg.replace("info", "");
            assert!(!shown.contains(nonsense), "{nonsense} in {name}");
        }
        assert!(svg.len() < 400_000, "{name}: {} bytes", svg.len());
    }
}

/// Tags balance, attributes are quoted, nothing unescaped is left over. Small on purpose: the writer under test only
/// knows elements and escaped text.
fn assert_well_formed(name: &str, svg: &str) {
    let mut open = Vec::new();
    for piece in svg.split('<').skip(1) {
        let (tag, text) = piece
            .split_once('>')
            .unwrap_or_else(|| panic!("{name}: <{piece}"));
        assert!(!text.contains('>'), "{name}: {text}");
        for entity in text.split('&').skip(1) {
            let known = ["amp;", "lt;", "gt;", "quot;", "#39;"]
                .iter()
                .any(|e| entity.starts_with(e));
            assert!(known, "{name}: &{entity}");
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "{name}: {tag}");
        let element = tag.split([' ', '/']).next().unwrap();
        match tag.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed), "{name}"),
            None if tag.ends_with('/') => {}
            None => open.push(element),
        }
    }
    assert!(open.is_empty(), "{name}: {open:?}");
}

/// Texts on the same line must not overlap, by the same careful estimate the layout uses.
#[test]
fn labels_never_overlap() {
    for (name, timeline) in all() {
        let mut boxes: Vec<(f64, f64, f64, f64, String)> = Vec::new();
        for line in render(&timeline)
            .lines()
            .filter(|line| line.starts_with("<text "))
        {
            let attribute = |key: &str| {
                let (_, rest) = line.split_once(&format!(" {key}=\""))?;
                Some(rest.split('"').next().unwrap())
            };
            let number = |key: &str| attribute(key).unwrap().parse::<f64>().unwrap();
            let text = line.split_once('>').unwrap().1.strip_suffix("</text>").unwrap();
            let text = text
                .replace("&lt;", "<")
                .replace("&gt;", ">")
                .replace("&#39;", "'");
            let text = text.replace("&quot;", "\"").replace("&amp;", "&");
            let (x, y, size) = (number("x"), number("y"), number("font-size"));
            let font = match attribute("font-weight") {
                Some(_) => Font::new(size).bold(),
                None => Font::new(size),
            };
            let width = font.width(&text);
            let left = match attribute("text-anchor") {
                Some("middle") => x - width / 2.0,
                Some("end") => x - width,
                _ => x,
            };
            assert!(
                left >= 0.0 && left + width <= WIDTH,
                "{name}: {text:?} leaves the picture"
            );
            boxes.push((left, left + width, y - size * 0.78, y + size * 0.22, text));
        }
        for (n, a) in boxes.iter().enumerate() {
            for b in &boxes[n + 1..] {
                let apart = a.1 <= b.0 || b.1 <= a.0 || a.3 <= b.2 || b.3 <= a.2;
                assert!(apart, "{name}: {:?} overlaps {:?}", a.4, b.4);
            }
        }
    }
}
