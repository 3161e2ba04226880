//! Which addresses of this host a sender can use, and the MTU of the route to a peer.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{getsockopt, sockopt};

/// The addresses to advertise for a socket bound to `bound`: itself, or for the wildcard those of the
/// host's interfaces that are up. Loopback only when there is nothing else.
pub(super) fn advertised(bound: SocketAddr) -> Vec<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return vec![bound];
    }
    let Ok(interfaces) = getifaddrs() else { return Vec::new() };
    let found: Vec<IpAddr> = interfaces
        .filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .filter(|ip| bound.is_ipv6() || ip.is_ipv4())
        .filter(|ip| !is_link_local(ip))
        .collect();
    let (loopback, mut usable): (Vec<_>, Vec<_>) = found.into_iter().partition(IpAddr::is_loopback);
    if usable.is_empty() {
        usable = loopback;
    }
    // IPv4 first: it is the one that is routed everywhere.
    usable.sort_by_key(IpAddr::is_ipv6);
    usable.dedup();
    usable.into_iter().map(|ip| SocketAddr::new(ip, bound.port())).collect()
}

/// A link-local address means nothing without the name of an interface.
fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// IP and UDP headers of a datagram to `peer`.
pub(super) fn header_bytes(peer: IpAddr) -> u64 {
    if peer.to_canonical().is_ipv4() { 28 } else { 48 }
}

/// Largest UDP payload of the route to `peer` as this host knows it; `None` when it does not.
pub(super) fn route_payload_bytes(peer: SocketAddr) -> Option<u16> {
    // The kernel tells the route's MTU for IPv4 only through `nix`.
    let IpAddr::V4(ip) = peer.ip().to_canonical() else { return None };
    let probe = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    probe.connect((ip, peer.port())).ok()?;
    let mtu = getsockopt(&probe, sockopt::IpMtu).ok()?;
    let payload = u64::try_from(mtu).ok()?.checked_sub(header_bytes(peer.ip()))?;
    Some(u16::try_from(payload).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_advertises_addresses_that_can_be_dialled() {
        let list = advertised("0.0.0.0:4433".parse().unwrap());
        assert!(!list.is_empty());
        for address in list {
            assert!(address.is_ipv4() && address.port() == 4433 && !address.ip().is_unspecified());
        }
    }

    #[test]
    fn a_bound_address_advertises_itself() {
        let address = "127.0.0.1:9".parse().unwrap();
        assert_eq!(advertised(address), [address]);
    }

    #[test]
    fn the_loopback_route_has_a_large_mtu() {
        assert!(route_payload_bytes("127.0.0.1:9".parse().unwrap()).unwrap() > 1_400);
    }
}
