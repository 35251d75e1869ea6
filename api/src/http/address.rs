//! Where a request comes from: the other end of its connection or, behind proxies that are trusted, what they say.

use http::HeaderMap;
use ipnet::{IpNet, Ipv6Net};
use shared::network;
use std::net::{IpAddr, SocketAddr};

/// The proxies that are believed. `TRUSTED_PROXIES`, none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies(Vec<IpNet>);

impl Proxies {
    /// Addresses and networks. `None` when one is neither.
    pub fn of(texts: &[String]) -> Option<Self> {
        network::parse_all(texts).map(Self)
    }

    /// Whether this is the address of one of them.
    pub fn trust(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The client's address: the last in `X-Forwarded-For` that isn't a trusted proxy's. What stands before it was
    /// written by somebody who isn't trusted.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        let values = headers.get_all("x-forwarded-for").iter().rev();
        let hops = values.flat_map(|value| value.to_str().unwrap_or_default().rsplit(','));
        for hop in hops {
            if !self.trust(client) {
                break;
            }
            match hop_address(hop.trim()) {
                Some(address) => client = address,
                None => break,
            }
        }
        client
    }
}

/// Whether the address is in one of these networks; of none, every address is.
pub fn is_in(networks: &[String], address: IpAddr) -> bool {
    networks.is_empty()
        || networks
            .iter()
            .filter_map(|text| network::parse(text))
            .any(|network| network.contains(&address))
}

/// The address by which a client is counted: one client can have all addresses of an IPv6 network of 64 bits.
pub fn counted(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => match Ipv6Net::new(address, 64) {
            Ok(network) => network.trunc().to_string(),
            Err(_) => address.to_string(),
        },
    }
}

/// An address as proxies write it: alone, or with a port.
fn hop_address(text: &str) -> Option<IpAddr> {
    let bare = text.trim_matches(['[', ']', '"']);
    let address = bare.parse::<IpAddr>().ok();
    let address = address.or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()));
    address.map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn client(proxies: &[&str], peer: &str, forwarded: &[&'static str]) -> String {
        let proxies = Proxies::of(&proxies.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", HeaderValue::from_static(value));
        }
        proxies.client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        for (proxies, peer, forwarded, expected) in [
            (vec![], "192.0.2.1", vec!["10.9.9.9"], "192.0.2.1"),
            (vec!["10.0.0.0/8"], "192.0.2.1", vec!["10.9.9.9"], "192.0.2.1"),
            (vec!["10.0.0.0/8"], "10.0.0.1", vec!["192.0.2.7"], "192.0.2.7"),
            (
                vec!["10.0.0.0/8"],
                "10.0.0.1",
                vec!["1.1.1.1, 192.0.2.7, 10.0.0.2"],
                "192.0.2.7",
            ),
            (
                vec!["10.0.0.0/8"],
                "10.0.0.1",
                vec!["1.1.1.1", "192.0.2.7"],
                "192.0.2.7",
            ),
            (
                vec!["10.0.0.1"],
                "::ffff:10.0.0.1",
                vec!["192.0.2.7:1234"],
                "192.0.2.7",
            ),
            (vec!["::1"], "::1", vec!["[2001:db8::1]:443"], "2001:db8::1"),
            (vec!["10.0.0.1"], "10.0.0.1", vec!["nonsense"], "10.0.0.1"),
            (vec!["10.0.0.1"], "10.0.0.1", vec![], "10.0.0.1"),
        ] {
            assert_eq!(
                client(&proxies, peer, &forwarded),
                expected,
                "{proxies:?} {peer} {forwarded:?}"
            );
        }
    }

    #[test]
    fn an_ipv4_network_may_be_written_as_ipv6() {
        let here = "127.0.0.1".parse().unwrap();
        for text in ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "::ffff:7f00:1"] {
            assert!(is_in(&[text.to_owned()], here), "{text}");
        }
        assert!(!is_in(&["::ffff:127.0.0.2".to_owned()], here));
        assert_eq!(
            client(&["::ffff:10.0.0.1"], "10.0.0.1", &["192.0.2.7"]),
            "192.0.2.7"
        );
    }

    #[test]
    fn an_ipv6_client_is_its_network() {
        assert_eq!(counted("192.0.2.1".parse().unwrap()), "192.0.2.1");
        assert_eq!(counted("2001:db8:1:2:3::4".parse().unwrap()), "2001:db8:1:2::/64");
    }

    #[test]
    fn no_network_is_every_address() {
        let here = "192.0.2.1".parse().unwrap();
        assert!(is_in(&[], here) && is_in(&["192.0.2.0/24".to_owned()], here));
        assert!(!is_in(&["10.0.0.0/8".to_owned()], here));
    }
}
