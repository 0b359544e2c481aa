//! What is put in comes out, and nothing else.

use super::*;
use crate::session::PAGE;

const COOKIE: &[u8] = b"<qemu-migration>\n  <name>g</name>\n  <uuid>u</uuid>\n</qemu-migration>\n\0";

fn an_offer() -> Offer {
    Offer {
        session: Uuid::from_u128(7),
        token: Token::new([3; 32]),
        encryption: Encryption::Always,
        certificate: vec![1, 2, 3, 255],
        blocks: vec![
            Block {
                name: "pc.ram".into(),
                size: 1 << 30,
                resident: 1 << 20,
                page: 2 << 20,
            },
            Block {
                name: "odd<>&'\" name".into(),
                size: PAGE,
                resident: 0,
                page: PAGE,
            },
        ],
    }
}

fn an_answer() -> Answer {
    Answer {
        session: Uuid::from_u128(7),
        encryption: Encryption::Never,
        certificate: vec![9; 400],
        host: "fe80::1%eth0".into(),
        port: 49152,
    }
}

#[test]
fn what_is_put_in_comes_out() {
    let cookie = with_offer(COOKIE, &an_offer()).unwrap();
    assert_eq!(cookie.last(), Some(&0));
    assert_eq!(offer(&cookie), Ok(Some(an_offer())));
    assert_eq!(answer(&cookie), Ok(None));
    let cookie = with_answer(COOKIE, &an_answer()).unwrap();
    assert_eq!(answer(&cookie), Ok(Some(an_answer())));
    for encryption in [Encryption::Always, Encryption::Never, Encryption::Certificates] {
        let protected = Offer {
            encryption,
            certificate: Vec::new(),
            ..an_offer()
        };
        let cookie = with_offer(COOKIE, &protected).unwrap();
        assert_eq!(offer(&cookie), Ok(Some(protected)));
    }
}

#[test]
fn a_plain_cookie_has_nothing_of_ours() {
    assert_eq!(offer(COOKIE), Ok(None));
    assert!(!is_probe(COOKIE));
    assert!(is_probe(&probe()));
}

#[test]
fn an_element_deeper_down_or_of_another_namespace_is_not_ours() {
    let ours = an_offer().element();
    let deeper = format!("<qemu-migration><x>{ours}</x></qemu-migration>\0");
    assert_eq!(offer(deeper.as_bytes()), Ok(None));
    let other = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
    let other = other.replace(NAMESPACE, "https://example.org/");
    assert_eq!(offer(other.as_bytes()), Ok(None));
}

#[test]
fn figures_are_added_to_libvirts() {
    let job = |statistics: &str| {
        format!("<qemu-migration>\n  <x><statistics>1</statistics></x>\n{statistics}</qemu-migration>\n\0")
    };
    let told = job("  <statistics>\n    <memory_total>7</memory_total>\n  </statistics>\n");
    let figures = [("memory_total", 100), ("memory_constant", 3)];
    let told = String::from_utf8(with_figures(told.as_bytes(), figures).unwrap()).unwrap();
    assert_eq!(
        told,
        job("  <statistics>\n    <memory_total>107</memory_total>\n  <memory_constant>3</memory_constant></statistics>\n")
    );
    let none = job("");
    assert_eq!(with_figures(none.as_bytes(), figures).unwrap(), none.as_bytes());
}

#[test]
fn another_version_is_named() {
    let cookie = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
    let cookie = cookie.replace("version='1'", "version='2'");
    assert_eq!(offer(cookie.as_bytes()), Err(Error::Version { theirs: 2 }));
}

#[test]
fn malformed_elements_are_refused() {
    let good = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
    for (from, to) in [
        ("token='03", "token='0x"),
        ("session='00000000", "session='zz"),
        ("encryption='always'", "encryption='maybe'"),
        ("certificate='AQID", "certificate='*"),
        ("size='4096'", "size='4097'"),
        ("size='4096'", "size='-1'"),
        ("size='4096'", "size='99999999999999999999'"),
        ("resident='0'", "resident='8192'"),
        ("page='2097152'", "page='0'"),
        ("page='2097152'", "page='3145728'"),
        ("page='2097152'", "page='2147483648'"),
        ("page='2097152'", "page='99999999999999999999'"),
        ("block='pc.ram'", "block=''"),
        ("block='pc.ram' ", ""),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        assert!(
            matches!(offer(bad.as_bytes()), Err(Error::Element(_))),
            "{from} -> {to}"
        );
    }
    let cut = &good.as_bytes()[..good.len() / 2];
    assert!(matches!(offer(cut), Err(Error::Cookie(_))));
}

#[test]
fn every_cut_and_every_flip_is_survived() {
    let good = with_offer(COOKIE, &an_offer()).unwrap();
    for index in 0..good.len() {
        let _ = offer(&good[..index]);
        let mut bad = good.clone();
        bad[index] ^= 0x15;
        let _ = offer(&bad);
        let _ = insert(&bad, "<x/>");
        let _ = with_figures(&bad, [("name", 1)]);
    }
}

#[test]
fn bounds_hold() {
    let huge = [vec![b' '; MAX_COOKIE], vec![0]].concat();
    assert!(matches!(offer(&huge), Err(Error::Cookie(_))));
    let many = "<f:memory block='b' size='4096' resident='0'/>".repeat(MAX_BLOCKS + 1);
    let head = an_offer().element();
    let head = &head[..head.find('>').unwrap()];
    let cookie =
        format!("<qemu-migration>{head} xmlns:f='{NAMESPACE}'>{many}</ferry:offer></qemu-migration>\0");
    assert!(matches!(offer(cookie.as_bytes()), Err(Error::Element(_))));
}
