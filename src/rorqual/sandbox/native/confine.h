// What a command inside a sandbox may not do: capabilities dropped, no new privileges, and a
// system-call filter. Applied in the child between fork and exec, so it holds on every substrate.
//
// The filter denies by list and by ceiling: numbers above the newest call reviewed here answer
// ENOSYS, as on an older kernel, so that a kernel upgrade never widens what is allowed.
#pragma once

#include <errno.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "no system-call filter for this machine"
#endif

#define NEWEST_REVIEWED_CALL 462  // mseal; both machines share the numbers above 424

#define NAMESPACE_FLAGS                                                                     \
    (CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | \
     CLONE_NEWCGROUP)

static const int DENIED_CALLS[] = {
    // mounts and roots
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, 428 /* open_tree */, 429 /* move_mount */,
    430 /* fsopen */, 431 /* fsconfig */, 432 /* fsmount */, 433 /* fspick */,
    442 /* mount_setattr */, 457 /* statmount */, 458 /* listmount */, SYS_quotactl,
    443 /* quotactl_fd */, SYS_swapon, SYS_swapoff, SYS_name_to_handle_at, SYS_open_by_handle_at,
    SYS_fanotify_init,
    // other processes
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kcmp, 438 /* pidfd_getfd */,
    440 /* process_madvise */, SYS_move_pages, SYS_migrate_pages, SYS_setns,
    // the kernel and the machine
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_bpf,
    SYS_perf_event_open, SYS_userfaultfd, SYS_add_key, SYS_request_key, SYS_keyctl, SYS_reboot,
    SYS_acct, SYS_syslog, SYS_sethostname, SYS_setdomainname, SYS_settimeofday, SYS_clock_settime,
    SYS_adjtimex, SYS_clock_adjtime, SYS_vhangup, SYS_nfsservctl, SYS_lookup_dcookie,
    425 /* io_uring_setup */, 426 /* io_uring_enter */, 427 /* io_uring_register */,
    447 /* memfd_secret */,
#if defined(__x86_64__)
    SYS_kexec_file_load, SYS_iopl, SYS_ioperm, SYS_modify_ldt, SYS__sysctl, SYS_uselib, SYS_ustat,
    SYS_sysfs, SYS_create_module, SYS_get_kernel_syms, SYS_query_module,
#endif
};

static const uint32_t ALLOWED_SOCKET_FAMILIES[] = {1 /* unix */, 2 /* inet */, 10 /* inet6 */,
                                                   16 /* netlink: name resolution asks it */};
static const uint32_t ALLOWED_PERSONALITIES[] = {0, 8, 0x20000, 0x20008, 0xffffffff};
static const uint32_t DENIED_IOCTLS[] = {0x5412 /* TIOCSTI */, 0x541c /* TIOCLINUX */};

#define LOAD(field) \
    ((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field)))
#define RETURN(value) ((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, value))
#define IF_EQUAL(value, yes, no) \
    ((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no))
#define IF_ANY_BIT(value, yes, no) \
    ((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, value, yes, no))
#define REFUSE(error) RETURN(SECCOMP_RET_ERRNO | (error))
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

// Append the argument test of one call: `values` either are the only ones allowed or are refused.
static size_t argument_rule(struct sock_filter *out, uint32_t call, int index, const uint32_t *values,
                            size_t count, int listed_are_allowed, uint32_t error) {
    size_t n = 0;
    out[n++] = IF_EQUAL(call, 0, (uint8_t)(count * 2 + 3));
    out[n++] = LOAD(args[index]);
    for (size_t i = 0; i < count; i++) {
        out[n++] = IF_EQUAL(values[i], 0, 1);
        out[n++] = listed_are_allowed ? RETURN(SECCOMP_RET_ALLOW) : REFUSE(error);
    }
    out[n++] = listed_are_allowed ? REFUSE(error) : RETURN(SECCOMP_RET_ALLOW);
    out[n++] = LOAD(nr);
    return n;
}

static int install_filter(void) {
    struct sock_filter code[256];
    size_t n = 0;
    code[n++] = LOAD(arch);
    code[n++] = IF_EQUAL(NATIVE_ARCH, 1, 0);
    code[n++] = RETURN(SECCOMP_RET_KILL_PROCESS);  // 32-bit entry points reach other tables
    code[n++] = LOAD(nr);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, NEWEST_REVIEWED_CALL, 0, 1);
    code[n++] = REFUSE(ENOSYS);
    code[n++] = IF_EQUAL(435 /* clone3 hides its flags behind a pointer; libc falls back */, 0, 1);
    code[n++] = REFUSE(ENOSYS);
    for (size_t i = 0; i < LENGTH(DENIED_CALLS); i++) {
        code[n++] = IF_EQUAL((uint32_t)DENIED_CALLS[i], 0, 1);
        code[n++] = REFUSE(EPERM);
    }
    const uint32_t namespace_calls[] = {SYS_clone, SYS_unshare};
    for (size_t i = 0; i < LENGTH(namespace_calls); i++) {
        code[n++] = IF_EQUAL(namespace_calls[i], 0, 4);
        code[n++] = LOAD(args[0]);
        code[n++] = IF_ANY_BIT(NAMESPACE_FLAGS, 0, 1);
        code[n++] = REFUSE(EPERM);
        code[n++] = LOAD(nr);
    }
    n += argument_rule(code + n, SYS_socket, 0, ALLOWED_SOCKET_FAMILIES,
                       LENGTH(ALLOWED_SOCKET_FAMILIES), 1, EAFNOSUPPORT);
    n += argument_rule(code + n, SYS_personality, 0, ALLOWED_PERSONALITIES,
                       LENGTH(ALLOWED_PERSONALITIES), 1, EPERM);
    n += argument_rule(code + n, SYS_ioctl, 1, DENIED_IOCTLS, LENGTH(DENIED_IOCTLS), 0, EPERM);
    code[n++] = RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
}

static int set_capabilities(uint64_t kept) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    for (int i = 0; i < 2; i++)
        data[i].effective = data[i].permitted = (uint32_t)(kept >> (32 * i));
    return (int)syscall(SYS_capset, &header, data);
}

// The capabilities a process of this agent holds now.
static uint64_t held_capabilities(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    if (syscall(SYS_capget, &header, data) < 0) return 0;
    return ((uint64_t)data[1].permitted << 32) | data[0].permitted;
}

// Become uid:gid with no capability but `kept`, now and after exec. Returns 0 or -1 with errno.
static int confine(uid_t uid, gid_t gid, uint64_t kept) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -1;
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    uint64_t held = held_capabilities();
    if (held & (1ull << CAP_SETPCAP))
        for (int cap = 0; cap <= 63; cap++)
            if (!(kept >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0) break;
    // Without CAP_SETGID (an unprivileged sandbox) there is only one user: asking for it is fine.
    if (held & (1ull << CAP_SETGID) && setgroups(0, NULL) < 0) return -1;
    if (getgid() != gid && setresgid(gid, gid, gid) < 0) return -1;
    if (getuid() != uid && setresuid(uid, uid, uid) < 0) return -1;
    if (set_capabilities(kept & held) < 0) return -1;
    return install_filter();
}
