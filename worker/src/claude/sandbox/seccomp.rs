//! The system calls that a run doesn't get: those that look into other processes, make namespaces and mounts, or lead into
//! large parts of the kernel that no tool of a run needs. A list of what is refused, because compilers, test runners and
//! browsers use nearly everything else. The answer is always "not implemented", for which programs have a fallback.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Refused whatever the arguments are. `clone3` has its flags in memory, where a filter can't read them; the C library
/// falls back to `clone`.
const REFUSED: [i64; 31] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_clone3,
    libc::SYS_open_by_handle_at,
    libc::SYS_kexec_load,
    libc::SYS_quotactl,
];

/// The flags of `clone` that make namespaces.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// The families of sockets that a run may use; of netlink only the part that tells about interfaces and routes.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Characters put into a terminal, as if its user had typed them.
const TERMINAL: [u64; 2] = [0x5412, 0x541C];

/// On x86-64 every call has a second number, of an ABI with short pointers; and these calls a third one.
const X32: i64 = 0x4000_0000;
const X32_ONLY: [i64; 3] = [521, 539, 540];

/// The program for the kernel, as bubblewrap takes it. Fails on a processor that the filter isn't made for.
pub(super) fn program() -> io::Result<Vec<u8>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let rules = rules(matches!(arch, TargetArch::x86_64)).map_err(io::Error::other)?;
    let refused = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap_or(1));
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).map_err(io::Error::other)?;
    let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
    let instructions = program.iter().flat_map(|instruction| {
        let mut bytes = instruction.code.to_ne_bytes().to_vec();
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_ne_bytes());
        bytes
    });
    Ok(instructions.collect())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(x32: bool) -> Result<Rules, seccompiler::BackendError> {
    let is =
        |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    let number = |value: libc::c_int| u64::from(value.unsigned_abs());
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, Vec::new())).collect();

    let mut cloning = Vec::new();
    for flag in NAMESPACES.map(number) {
        cloning.push(SeccompRule::new(vec![is(
            0,
            SeccompCmpOp::MaskedEq(flag),
            flag,
        )?])?);
    }
    rules.insert(libc::SYS_clone, cloning);

    let mut others = Vec::new();
    for family in FAMILIES.map(number) {
        others.push(is(0, SeccompCmpOp::Ne, family)?);
    }
    let netlink = vec![
        is(0, SeccompCmpOp::Eq, number(libc::AF_NETLINK))?,
        is(2, SeccompCmpOp::Ne, number(libc::NETLINK_ROUTE))?,
    ];
    let sockets = vec![SeccompRule::new(others)?, SeccompRule::new(netlink)?];
    rules.insert(libc::SYS_socket, sockets.clone());
    rules.insert(libc::SYS_socketpair, sockets);

    let mut typing = Vec::new();
    for request in TERMINAL {
        typing.push(SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, request)?])?);
    }
    rules.insert(libc::SYS_ioctl, typing);

    if x32 {
        let second: Vec<_> = rules
            .iter()
            .map(|(call, rules)| (call | X32, rules.clone()))
            .collect();
        rules.extend(second);
        rules.extend(X32_ONLY.map(|call| (call | X32, Vec::new())));
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_a_program_that_the_kernel_takes() {
        let program = program().unwrap();

        assert_eq!(program.len() % 8, 0);
        // The kernel takes 4,096 instructions.
        assert!((100..4_096 * 8).contains(&program.len()), "{}", program.len());
    }

    #[test]
    fn both_numbers_of_a_call_are_refused() {
        let rules = rules(true).unwrap();

        for call in [libc::SYS_ptrace, libc::SYS_socket, libc::SYS_clone] {
            assert_eq!(rules[&call], rules[&(call | X32)], "{call}");
        }
        assert!(rules[&libc::SYS_ptrace].is_empty() && rules.contains_key(&(X32_ONLY[0] | X32)));
    }
}
