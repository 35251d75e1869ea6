//! Networks, as settings and API keys name them.

use ipnet::{IpNet, Ipv4Net};
use std::net::IpAddr;

/// Reads a network in CIDR form, or one address. An IPv4 network that is written as IPv6 (`::ffff:10.0.0.0/104`) becomes
/// an IPv4 network, because addresses are compared in their IPv4 form. `None` if the text is neither.
pub fn parse(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().ok();
    let network = network.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?;
    let IpNet::V6(mapped) = network else {
        return Some(network);
    };
    match (
        mapped.addr().to_ipv4_mapped(),
        mapped.prefix_len().checked_sub(96),
    ) {
        (Some(address), Some(length)) => Ipv4Net::new(address, length).ok().map(IpNet::V4),
        _ => Some(network),
    }
}

/// The same for a list. `None` if one of the texts is neither a network nor an address.
pub fn parse_all(texts: &[String]) -> Option<Vec<IpNet>> {
    texts.iter().map(|text| parse(text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_nonsense_is_not() {
        for text in ["10.0.0.0/8", "10.0.0.1", "::1", "2001:db8::/32"] {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in ["", "10.0.0.0/33", "10.0.0", "localhost", "10.0.0.0/8 ", "::/129"] {
            assert!(parse(text).is_none(), "{text}");
        }
        assert_eq!(parse_all(&["10.0.0.1".to_owned(), "x".to_owned()]), None);
    }

    #[test]
    fn an_ipv4_network_may_be_written_as_ipv6() {
        for (text, network) in [
            ("::ffff:127.0.0.1", "127.0.0.1/32"),
            ("::ffff:127.0.0.0/104", "127.0.0.0/8"),
            ("::ffff:7f00:1", "127.0.0.1/32"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), network);
        }
    }
}
