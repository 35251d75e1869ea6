//! What is kept of a receiver's response, for people who look for the cause of a failed delivery.

use shared::webhook::address;
use std::net::{IpAddr, SocketAddr};

/// The longest snippet, in bytes.
const LONGEST: usize = 1_024;

/// How much of a response is needed for a snippet, in bytes. It is more than the longest snippet, so that no address is
/// cut before it can be recognised.
pub(super) const NEEDED: usize = 2 * LONGEST;

/// The start of a response as one line of text: at most 1 KiB, without control characters. Addresses that aren't public
/// are masked, because proxies in front of a receiver like to name those behind them.
pub(super) fn snippet(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(NEEDED)]);
    let mut line = String::with_capacity(text.len());
    for word in text.split_inclusive(|c: char| !is_part_of_address(c)) {
        let bare = word.trim_end_matches(|c| !is_part_of_address(c));
        let after = &word[bare.len()..];
        line.push_str(if names_inside(bare) { "(address)" } else { bare });
        line.extend(after.chars().filter_map(|c| match c {
            '\n' | '\r' | '\t' => Some(' '),
            c if c.is_control() => None,
            c => Some(c),
        }));
    }
    line.truncate(line.floor_char_boundary(LONGEST));
    line
}

/// Letters too, so that the `d::` in `std::io` isn't taken for an address.
fn is_part_of_address(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | ':')
}

fn names_inside(word: &str) -> bool {
    let word = word.trim_end_matches(['.', ':']);
    let address = word.parse::<IpAddr>().ok();
    let address = address.or_else(|| Some(word.parse::<SocketAddr>().ok()?.ip()));
    address.is_some_and(|address| !address::is_public(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snippet_is_one_clean_line() {
        for (body, line) in [
            (&b""[..], ""),
            (b"not today", "not today"),
            (b"a\r\nb\tc\0d\x1b[31me\x7f", "a  b cd[31me"),
            (b"caf\xc3\xa9 \xff", "café \u{fffd}"),
            ("a\u{85}b".as_bytes(), "ab"),
        ] {
            assert_eq!(snippet(body), line);
        }
    }

    #[test]
    fn a_snippet_is_cut_between_characters() {
        assert_eq!(snippet(&[b'x'; 5_000]).len(), LONGEST);
        assert_eq!(snippet("é".repeat(5_000).as_bytes()).len(), LONGEST);
        assert_eq!(snippet("€".repeat(5_000).as_bytes()).len(), 1_023);
        assert!(snippet(&[0xff; 5_000]).len() <= LONGEST);
    }

    #[test]
    fn inside_addresses_are_masked() {
        for (body, line) in [
            ("no route to 10.1.2.3.", "no route to (address)"),
            ("upstream 10.1.2.3:8080: refused", "upstream (address) refused"),
            ("http://192.168.0.7/x", "http://(address)/x"),
            (
                "[fd00::1]:443 [::1] ::ffff:127.0.0.1",
                "[(address)]:443 [(address)] (address)",
            ),
            ("10.0.0.1,10.0.0.2", "(address),(address)"),
            ("8.8.8.8 and [2606:4700::1]", "8.8.8.8 and [2606:4700::1]"),
            (
                "std::io::Error at 12:30:00, version 1.2",
                "std::io::Error at 12:30:00, version 1.2",
            ),
        ] {
            assert_eq!(snippet(body.as_bytes()), line);
        }
        // One that would be cut.
        let long = format!("{} 169.254.169.254", "x".repeat(LONGEST - 8));
        assert!(!snippet(long.as_bytes()).contains("169"));
    }
}
