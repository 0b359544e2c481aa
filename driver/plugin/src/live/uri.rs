//! Migration URIs: where the operator wants the data to go. Pure.

use crate::libvirt::Params;
use virt_sys::{VIR_MIGRATE_PARAM_DISKS_PORT, VIR_MIGRATE_PARAM_DISKS_URI};

/// The destination's data address as a client's URI has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataAddress {
    /// Name or address, without brackets.
    pub host: String,
    /// The port, where the operator chose one.
    pub port: Option<u16>,
}

/// Reads `tcp:HOST[:PORT]`, as libvirt 0.x wrote it, and `tcp://HOST[:PORT]`; `None` for any other scheme or shape.
pub fn parse(uri: &str) -> Option<DataAddress> {
    let rest = uri.strip_prefix("tcp:")?;
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.strip_prefix('[') {
        Some(bracketed) => {
            let (host, after) = bracketed.split_once(']')?;
            match after {
                "" => (host, None),
                after => (host, Some(after.strip_prefix(':')?)),
            }
        }
        None => match rest.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        },
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:%".contains(&byte);
    if host.is_empty() || host.len() > 255 || !host.bytes().all(plain) {
        return None;
    }
    let port = match port {
        Some(port) => Some(port.parse().ok().filter(|port| *port != 0)?),
        None => None,
    };
    Some(DataAddress {
        host: host.to_owned(),
        port,
    })
}

/// The URI of an engine that listens at this host and port, as libvirt's Prepare would return it.
pub fn of(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("tcp:[{host}]:{port}"),
        false => format!("tcp:{host}:{port}"),
    }
}

/// The URI of an NBD server for disks at this host, or listening at this address.
pub fn disks(host: &str, port: Option<u16>) -> String {
    let host = match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    };
    match port {
        Some(port) => format!("tcp://{host}:{port}"),
        None => format!("tcp://{host}"),
    }
}

/// Parameters that say where disks go; where the operator has said so, that stands. libvirt refuses a port beside it.
pub fn with_disks<'a>(params: Params<'a>, uri: &str) -> Params<'a> {
    match params.utf8(VIR_MIGRATE_PARAM_DISKS_URI) {
        Some(_) => params,
        None => params
            .without(VIR_MIGRATE_PARAM_DISKS_PORT)
            .with(VIR_MIGRATE_PARAM_DISKS_URI, uri),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libvirt_writes_is_read() {
        let address = |host: &str, port| {
            Some(DataAddress {
                host: host.into(),
                port,
            })
        };
        assert_eq!(parse("tcp://10.0.0.1"), address("10.0.0.1", None));
        assert_eq!(
            parse("tcp:host.example:49160"),
            address("host.example", Some(49160))
        );
        assert_eq!(parse("tcp://[fe80::1%eth0]:1/"), address("fe80::1%eth0", Some(1)));
        assert_eq!(parse("tcp://[::1]"), address("::1", None));
        assert_eq!(parse(&of("::1", 7)), address("::1", Some(7)));
        assert_eq!(parse(&of("a", 7)), address("a", Some(7)));
    }

    #[test]
    fn the_rest_is_not() {
        let strange = [
            "",
            "tcp:",
            "rdma://a",
            "unix:///a",
            "tcp://a:0",
            "tcp://a:70000",
            "tcp://[::1",
            "tcp://a b",
            "tcp://[::1]x",
        ];
        for uri in strange {
            assert_eq!(parse(uri), None, "{uri}");
        }
    }
}
