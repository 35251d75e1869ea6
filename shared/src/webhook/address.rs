//! The address guard: where requests that a client asked for may go. By default that is the public internet only, so that
//! no client can use this service to reach what only this machine can reach.
//!
//! A URL is checked before it is accepted, and every address when a connection is made, because a name may lead
//! elsewhere by then.

use crate::env::{Error, Vars};
use crate::network;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use url::{Host, Url};

/// The longest URL, in bytes.
const LONGEST: usize = 2_048;

/// The variables that widen what is allowed.
const ALLOW_HTTP: &str = "WEBHOOK_ALLOW_HTTP";
const ALLOWED_SUBNETS: &str = "WEBHOOK_ALLOWED_SUBNETS";

/// IPv4 networks that aren't part of the public internet.
const INSIDE_V4: [Ipv4Net; 16] = [
    v4([0, 0, 0, 0], 8),        // this network; 0.0.0.0 is this machine
    v4([10, 0, 0, 0], 8),       // private
    v4([100, 64, 0, 0], 10),    // carrier-grade NAT
    v4([127, 0, 0, 0], 8),      // loopback
    v4([168, 63, 129, 16], 32), // the platform's own services in Azure
    v4([169, 254, 0, 0], 16),   // link-local; metadata of cloud machines
    v4([172, 16, 0, 0], 12),    // private
    v4([192, 0, 0, 0], 24),     // protocol assignments
    v4([192, 0, 2, 0], 24),     // documentation
    v4([192, 88, 99, 0], 24),   // relays of 6to4
    v4([192, 168, 0, 0], 16),   // private
    v4([198, 18, 0, 0], 15),    // benchmarks
    v4([198, 51, 100, 0], 24),  // documentation
    v4([203, 0, 113, 0], 24),   // documentation
    v4([224, 0, 0, 0], 4),      // multicast
    v4([240, 0, 0, 0], 4),      // reserved, and broadcast
];

/// The only IPv6 network with public addresses. Outside of it are loopback, unspecified, link-local, site-local and
/// unique local addresses, multicast, NAT64 (`64:ff9b::/96`, `64:ff9b:1::/48`), discard-only (`100::/64`), segment routing
/// (`5f00::/16`) and IPv4-compatible addresses.
const PUBLIC_V6: Ipv6Net = v6(0x2000, 0, 3);

/// The parts of it that aren't public.
const INSIDE_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23),     // protocol assignments: Teredo, benchmarks, ORCHID
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4, which has an IPv4 address in it
    v6(0x3fff, 0, 20),     // documentation
];

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(first: u16, second: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), length)
}

/// Whether an address is part of the public internet.
pub fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => !INSIDE_V4.iter().any(|network| network.contains(&address)),
        IpAddr::V6(address) => {
            PUBLIC_V6.contains(&address) && !INSIDE_V6.iter().any(|network| network.contains(&address))
        }
    }
}

/// What is allowed: public addresses, and the networks that the operator added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Networks that are allowed although they aren't public. `WEBHOOK_ALLOWED_SUBNETS`, none by default.
    pub allowed: Vec<IpNet>,
    /// Whether a URL may be `http`. `WEBHOOK_ALLOW_HTTP`, false by default.
    pub allow_http: bool,
}

impl Guard {
    /// `WEBHOOK_ALLOWED_SUBNETS` and `WEBHOOK_ALLOW_HTTP`.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let allowed = network::parse_all(&vars.list(ALLOWED_SUBNETS, "")?).ok_or_else(|| {
            Error::new(
                ALLOWED_SUBNETS,
                "has a member that is neither an address nor a network",
                "such as 10.0.0.7 or 10.0.0.0/8, with commas between them",
            )
        })?;
        Ok(Self {
            allowed,
            allow_http: vars.flag(ALLOW_HTTP, false)?,
        })
    }

    /// Whether a connection to this address is allowed.
    pub fn allows(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        is_public(address) || self.allowed.iter().any(|network| network.contains(&address))
    }

    /// Checks the URL of a receiver, as far as it can be done without resolving its name: `https` (or `http`, if that is
    /// allowed), without user, password and fragment, port 443, 80 or at least 1024, at most 2,048 bytes. An address in
    /// it, in whatever notation, must be allowed.
    pub fn check_url(&self, text: &str) -> Result<Target, Refusal> {
        if text.len() > LONGEST {
            return Err(Refusal::TooLong);
        }
        // The parser would drop them without a word.
        if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(Refusal::NoUrl);
        }
        let url = Url::parse(text).map_err(|_| Refusal::NoUrl)?;
        match url.scheme() {
            "https" => {}
            "http" if self.allow_http => {}
            "http" => return Err(Refusal::Http),
            _ => return Err(Refusal::NoUrl),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Refusal::User);
        }
        if url.fragment().is_some() {
            return Err(Refusal::Fragment);
        }
        if !matches!(url.port_or_known_default(), Some(80 | 443 | 1024..)) {
            return Err(Refusal::Port);
        }
        let allowed = match url.host().ok_or(Refusal::NoUrl)? {
            Host::Ipv4(address) => self.allows(address.into()),
            Host::Ipv6(address) => self.allows(address.into()),
            Host::Domain(name) if is_localhost(name) => {
                self.allows(Ipv4Addr::LOCALHOST.into()) || self.allows(Ipv6Addr::LOCALHOST.into())
            }
            Host::Domain(_) => true,
        };
        // Non-ASCII characters become longer.
        if url.as_str().len() > LONGEST {
            return Err(Refusal::TooLong);
        }
        if allowed {
            Ok(Target(url))
        } else {
            Err(Refusal::Address)
        }
    }
}

/// Names that mean this machine wherever they are resolved.
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    name == "localhost" || name.ends_with(".localhost")
}

/// A URL that was checked, in its normal form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(Url);

impl Target {
    /// The URL, to send requests to.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// Host and port, which tell receivers apart: `hooks.example.com:443`.
    pub fn authority(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        let port = self.0.port_or_known_default().unwrap_or_default();
        format!("{host}:{port}")
    }
}

/// A URL for people. A query is masked, because it often has a credential in it.
pub fn masked(url: &str) -> String {
    match url.split_once('?') {
        Some((start, _)) => format!("{start}?…"),
        None => url.to_owned(),
    }
}

/// Why a URL isn't accepted: a sentence for people, which names the setting that would allow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It isn't a URL, or of another scheme.
    #[error("The URL should be absolute, such as https://example.com/hook")]
    NoUrl,
    /// It is too long.
    #[error("The URL should have at most 2,048 bytes")]
    TooLong,
    /// It isn't encrypted.
    #[error(
        "The URL should start with https://. The operator can allow http:// with WEBHOOK_ALLOW_HTTP=true"
    )]
    Http,
    /// It has a user or a password.
    #[error("The URL should have no user and no password. Verify the signature of a webhook instead")]
    User,
    /// It has a fragment.
    #[error("The URL should have no fragment (#…), because it is never sent")]
    Fragment,
    /// The port belongs to another service.
    #[error("The port of the URL should be 443, 80 or at least 1024")]
    Port,
    /// It leads to an address that isn't public.
    #[error(
        "The URL should lead to a public address. The operator can allow others with WEBHOOK_ALLOWED_SUBNETS"
    )]
    Address,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allowed: &[&str], allow_http: bool) -> Guard {
        let allowed = allowed.iter().map(|text| network::parse(text).unwrap()).collect();
        Guard { allowed, allow_http }
    }

    const INSIDE: [&str; 75] = [
        "0.0.0.0",
        "0.0.0.1",
        "0.1.2.3",
        "10.0.0.0",
        "10.254.0.0",
        "10.255.255.255",
        "100.64.0.0",
        "100.100.0.0",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "168.63.129.16",
        "169.254.45.1",
        "169.254.169.254",
        "172.16.10.65",
        "172.31.255.255",
        "192.0.0.0",
        "192.0.0.192",
        "192.0.0.255",
        "192.0.2.255",
        "192.88.99.1",
        "192.168.10.65",
        "198.18.0.0",
        "198.19.255.255",
        "198.51.100.65",
        "203.0.113.6",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "250.10.20.30",
        "255.255.255.255",
        "::",
        "::1",
        "::2",
        // IPv4-compatible
        "::127.0.0.1",
        "::10.0.0.1",
        "::8.8.8.8",
        // IPv4-mapped
        "::ffff:0.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:255.255.255.255",
        // IPv4-translated
        "::ffff:0:127.0.0.1",
        // NAT64
        "64:ff9b::127.0.0.1",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::1",
        "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
        // discard-only, dummy
        "100::",
        "100::1",
        "100:0:0:1::1",
        // Teredo, benchmarks, ORCHID
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:2::1",
        "2001:2:0:ffff:ffff:ffff:ffff:ffff",
        "2001:10::1",
        "2001:20::1",
        "2001:1ff:ffff::1",
        // documentation
        "2001:db8::1",
        "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        "3fff::1",
        "3fff:fff:ffff::1",
        // 6to4
        "2002:7f00:1::",
        "2002:808:808::1",
        // SRv6
        "5f00::1",
        // unique local, with the metadata of cloud machines
        "fc00::1",
        "fd00:ec2::254",
        "fdff:ffff::1",
        // link-local, site-local, multicast
        "fe80::1",
        "febf::1",
        "fec0::1",
        "feff::1",
        "ff02::1",
        "ff0e::1",
        "4000::1",
    ];

    const OUTSIDE: [&str; 26] = [
        "1.0.0.0",
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "168.63.129.17",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "::ffff:8.8.8.8",
        "2000::1",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2a00:1450:4001:80b::200e",
    ];

    #[test]
    fn only_the_public_internet_is_allowed() {
        let guard = Guard::default();
        for text in INSIDE {
            assert!(!guard.allows(text.parse().unwrap()), "{text}");
        }
        for text in OUTSIDE {
            assert!(guard.allows(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn the_operator_can_allow_networks() {
        let guard = guard(&["127.0.0.0/8", "::ffff:10.0.0.0/104", "fd00::/8"], false);
        for text in ["127.0.0.1", "::ffff:127.9.9.9", "10.1.1.1", "fd00::1", "8.8.8.8"] {
            assert!(guard.allows(text.parse().unwrap()), "{text}");
        }
        for text in [
            "::1",
            "::127.0.0.1",
            "64:ff9b::127.0.0.1",
            "2002:7f00:1::",
            "192.168.0.1",
            "fc00::1",
        ] {
            assert!(!guard.allows(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn an_inside_address_is_refused_in_each_notation() {
        let guard = guard(&[], true);
        let hosts = [
            "127.0.0.1",
            "127.0.0.1.",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0x7F.0x0.0x0.0x1",
            "0177.0.0.1",
            "017700000001",
            "0177.0x0.1",
            "127.0.0.0x1",
            "0",
            "0x0",
            "00.0",
            "169.254.169.254",
            "2852039166",
            "0xa9fea9fe",
            "0251.0376.0251.0376",
            "10.1",
            "%31%32%37.0.0.1",
            "127%2e0%2e0%2e1",
            "１２７.０.０.１",
            "①②⑦.⓪.⓪.①",
            "127。0。0。1",
            "[::]",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[0000::0001]",
            "[::127.0.0.1]",
            "[::7f00:1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::FFFF:0a00:1]",
            "[0:0:0:0:0:ffff:127.0.0.1]",
            "[64:ff9b::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "ｌｏｃａｌｈｏｓｔ",
            "a.localhost",
        ];
        for host in hosts {
            for url in [
                format!("http://{host}/"),
                format!("https://{host}:8443/hook?a=b"),
                format!("https:\\\\{host}\\"),
                format!("https:{host}"),
            ] {
                assert_eq!(guard.check_url(&url), Err(Refusal::Address), "{url}");
            }
        }
        // What can't be read as an address isn't taken for a name either; nor are zones.
        for host in [
            "[fe80::1%25eth0]",
            "[fe80::1%eth0]",
            "[::1%25lo]",
            "[::1",
            "127.0.0.1.1",
            "256.0.0.1",
            "127.0.0.08",
            "4294967296",
            "0x100000000",
            "[v1.fe80::a]",
            "",
            "%00",
            "a%20b",
        ] {
            let url = format!("http://{host}/");
            let found = guard.check_url(&url);
            assert!(
                matches!(found, Err(Refusal::NoUrl | Refusal::Address)),
                "{url}: {found:?}"
            );
        }
    }

    #[test]
    fn a_url_is_accepted_by_scheme_port_and_form() {
        let (strict, open) = (guard(&[], false), guard(&["127.0.0.0/8"], true));
        let of_length = |length: usize| format!("https://a.example/{}", "x".repeat(length - 18));
        let grows = format!("https://a.example/{}", "é".repeat(900));
        for (guard, url, expected) in [
            (&strict, "https://a.example/hook?x=1", Ok(())),
            (&strict, "HTTPS://A.example", Ok(())),
            (&strict, "https://8.8.8.8/", Ok(())),
            (&strict, "https://[2001:4860:4860::8888]:8443/", Ok(())),
            (&strict, "https://bücher.example/", Ok(())),
            (&strict, "https://a.example:80/", Ok(())),
            (&strict, "https://a.example:1024/", Ok(())),
            (&strict, "https://a.example:65535/", Ok(())),
            (&strict, of_length(2_048).as_str(), Ok(())),
            (&open, "http://a.example/", Ok(())),
            (&open, "http://127.0.0.1:8080/", Ok(())),
            (&open, "http://localhost:8080/", Ok(())),
            (&open, "http://[::ffff:127.0.0.1]:8080/", Ok(())),
            (&open, "http://[::1]:8080/", Err(Refusal::Address)),
            (&strict, "http://a.example/", Err(Refusal::Http)),
            (&strict, of_length(2_049).as_str(), Err(Refusal::TooLong)),
            (&strict, grows.as_str(), Err(Refusal::TooLong)),
            (&strict, "https://u@a.example/", Err(Refusal::User)),
            (&strict, "https://u:p@a.example/", Err(Refusal::User)),
            (&strict, "https://:p@a.example/", Err(Refusal::User)),
            (&strict, "https://8.8.8.8@127.0.0.1/", Err(Refusal::User)),
            (&strict, "https://a.example/#x", Err(Refusal::Fragment)),
            (&strict, "https://a.example/#", Err(Refusal::Fragment)),
            (&strict, "https://a.example:0/", Err(Refusal::Port)),
            (&strict, "https://a.example:22/", Err(Refusal::Port)),
            (&strict, "https://a.example:1023/", Err(Refusal::Port)),
            (&strict, "https://a.example:65536/", Err(Refusal::NoUrl)),
            (&strict, "", Err(Refusal::NoUrl)),
            (&strict, "a.example/hook", Err(Refusal::NoUrl)),
            (&strict, "/hook", Err(Refusal::NoUrl)),
            (&strict, "//a.example/", Err(Refusal::NoUrl)),
            (&strict, "ftp://a.example/", Err(Refusal::NoUrl)),
            (&strict, "file:///etc/passwd", Err(Refusal::NoUrl)),
            (&strict, "unix:/run/docker.sock", Err(Refusal::NoUrl)),
            (&strict, "data:text/plain,x", Err(Refusal::NoUrl)),
            (&strict, " https://a.example/", Err(Refusal::NoUrl)),
            (&strict, "https://a.example/\r\nX: y", Err(Refusal::NoUrl)),
            (&strict, "ht\ttps://a.example/", Err(Refusal::NoUrl)),
            (&strict, "https://127.0.\n0.1/", Err(Refusal::NoUrl)),
        ] {
            assert_eq!(guard.check_url(url).map(drop), expected, "{url:?}");
        }
    }

    #[test]
    fn refusals_name_the_setting() {
        assert!(Refusal::Http.to_string().contains(ALLOW_HTTP));
        assert!(Refusal::Address.to_string().contains(ALLOWED_SUBNETS));
    }

    #[test]
    fn a_target_is_shown_without_its_query() {
        let target = |url| Guard::default().check_url(url).unwrap();
        let hook = target("https://Hooks.example/a?token=x&b");
        assert_eq!(hook.url().as_str(), "https://hooks.example/a?token=x&b");
        assert_eq!(hook.authority(), "hooks.example:443");
        assert_eq!(masked(hook.url().as_str()), "https://hooks.example/a?…");
        let plain = target("https://[2001:4860:4860::8888]:8443");
        assert_eq!(plain.authority(), "[2001:4860:4860::8888]:8443");
        assert_eq!(
            masked(plain.url().as_str()),
            "https://[2001:4860:4860::8888]:8443/"
        );
    }

    #[test]
    fn settings_are_read() {
        let guard = |subnets, http| {
            Guard::from_vars(&Vars::of([
                ("WEBHOOK_ALLOWED_SUBNETS", subnets),
                ("WEBHOOK_ALLOW_HTTP", http),
            ]))
        };
        assert_eq!(guard("", ""), Ok(Guard::default()));
        assert_eq!(
            guard("127.0.0.0/8, ::1", "true"),
            Ok(self::guard(&["127.0.0.0/8", "::1"], true))
        );
        assert_eq!(guard("nonsense", "").unwrap_err().variable, ALLOWED_SUBNETS);
        assert_eq!(guard("", "perhaps").unwrap_err().variable, ALLOW_HTTP);
    }
}
