// Owner of one container on the host: prepares its mounts, starts the runtime, waits, cleans up.
//
// Usage: shim STATE_DIR [--life] [--umount PATH] [--bind FROM TO] [--tmpfs PATH OPTIONS]
//             [--overlay PATH OPTIONS] [--mkdir PATH] [--cgroup DIR] [--residue DIR] [--wait] ...
//             -- RUNTIME ARGUMENT... [--again RUNTIME ARGUMENT...]
//        shim --spawn
//   --cgroup: joined before the runtime starts and removed at the end; --residue: only removed
//   descriptor 0: handed to the runtime (the agent's listening socket)
//   descriptor 2: log of the runtime
//   descriptor 3, with --life: the creator's end of a socket pair; when it closes, the container
//                 is killed. It closes here when everything is gone.
//   --wait: start the runtime only after a byte on descriptor 3; if that closes instead, clean up. The
//            creator makes the groups and the bundle while the mounts are made here.
//   --ttl MS: kill the container then, also a frozen one, in which the agent keeps no time
//   --again: a checkpoint ends a container. After a byte 'w' on descriptor 3 its end is not the last:
//            a byte 'r' with a descriptor runs this command, with that as descriptor 0.
//   --spawn: fork one owner per message on descriptor 0, see `spawn_on_request`
//
// All mounts are made in a private mount namespace, so whatever kills this process also unmounts
// them. A container whose shim was killed sees its guard pipe close and ends too; then only files
// and empty control groups remain, which the next sweep removes: STATE_DIR/lock is no longer held.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    LIFE_FD = 3,
    MAX_CGROUPS = 16,
    MAX_MOUNTS = 64,
    MAX_REQUEST = 1 << 16,    // bytes of one message of --spawn
    MAX_ARGUMENTS = 1 << 12,  // of one message
    GIVEN_FDS = 4,            // descriptors of one message, at most
};

static const char *cgroups[MAX_CGROUPS], *residues[MAX_CGROUPS], *mounts[MAX_MOUNTS];
static int num_cgroups, num_residues, num_mounts;
static long long ttl_ms = -1;
static bool waits;

static _Noreturn void fail(const char *what, const char *on) {
    dprintf(2, "shim: %s %s: %s\n", what, on, strerror(errno));
    _exit(1);
}

// Write `text` to DIR/NAME; a file that does not exist is not an error (other cgroup version).
static void write_in(const char *directory, const char *name, const char *text, bool must) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 && !must) return;
    if (fd < 0 || (write(fd, text, strlen(text)) < 0 && must)) fail("write", path);
    close(fd);
}

// Put this process, which has one thread, into a group. Version 1 can be given the thread alone:
// a whole process locks out every fork of the machine until all processors have passed a point,
// which takes milliseconds.
static void join(const char *group) {
    char path[4096];
    snprintf(path, sizeof path, "%s/tasks", group);
    write_in(group, access(path, F_OK) == 0 ? "tasks" : "cgroup.procs", "0", true);
}

static void mounted(const char *path) {
    if (num_mounts < MAX_MOUNTS) mounts[num_mounts++] = path;
}

static int prepare(int argc, char **argv, bool *life) {
    bool separated = false;
    for (int i = 2; i < argc;) {
        const char *name = argv[i], *path = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--")) return i + 1;
        if (!strcmp(name, "--ttl")) {
            ttl_ms = atoll(path);
            i += 2;
            continue;
        }
        if (!strcmp(name, "--life")) {
            *life = true;
            i += 1;
            continue;
        }
        if (!strcmp(name, "--wait")) {
            waits = true;
            i += 1;
            continue;
        }
        bool is_mount = !strcmp(name, "--umount") || !strcmp(name, "--bind") ||
                        !strcmp(name, "--tmpfs") || !strcmp(name, "--overlay");
        if (is_mount && !separated) {
            if (unshare(CLONE_NEWNS) < 0) fail("unshare", "mounts");
            if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) fail("make private", "/");
            separated = true;
        }
        const char *more = i + 2 < argc ? argv[i + 2] : "";
        if (!strcmp(name, "--umount")) {
            if (umount2(path, MNT_DETACH) < 0 && errno != EINVAL && errno != ENOENT) fail("umount", path);
            i += 2;
        } else if (!strcmp(name, "--mkdir")) {
            if (mkdir(path, 0755) < 0 && errno != EEXIST) fail("mkdir", path);
            i += 2;
        } else if (!strcmp(name, "--bind")) {
            if (mount(path, more, NULL, MS_BIND | MS_REC, NULL) < 0) fail("bind", more);
            if (mount(NULL, more, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0)
                fail("remount", more);
            mounted(more);
            i += 3;
        } else if (!strcmp(name, "--tmpfs")) {
            if (mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, more) < 0) fail("tmpfs", path);
            mounted(path);
            i += 3;
        } else if (!strcmp(name, "--overlay")) {
            if (mount("overlay", path, "overlay", MS_NOSUID | MS_NODEV, more) < 0) fail("overlay", path);
            mounted(path);
            i += 3;
        } else if (!strcmp(name, "--cgroup")) {
            if (num_cgroups == MAX_CGROUPS) fail("too many", "cgroups");
            cgroups[num_cgroups++] = path;
            i += 2;
        } else if (!strcmp(name, "--residue")) {
            if (num_residues == MAX_CGROUPS) fail("too many", "residues");
            residues[num_residues++] = path;
            i += 2;
        } else {
            errno = EINVAL;
            fail("option", name);
        }
    }
    errno = EINVAL;
    fail("missing", "--");
}

// Kill every process named in a file of process ids.
static void kill_listed(const char *path) {
    char list[65536];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, list, sizeof list - 1);
    if (fd >= 0) close(fd);
    if (n <= 0) return;
    list[n] = 0;
    for (char *p = list, *end; *p; p = end) {
        long pid = strtol(p, &end, 10);
        if (end == p) break;
        if (pid > 1 && pid != getpid()) kill((pid_t)pid, SIGKILL);
    }
}

// Kill what runs. The first process of most containers takes the others with it; looking through the
// groups takes longer than it dies and is for what is left then.
static void kill_children(bool all) {
    char path[4096];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
    kill_listed(path);
    for (int i = 0; i < num_cgroups; i++) {
        write_in(cgroups[i], "freezer.state", "THAWED", false);  // a frozen process cannot die
        write_in(cgroups[i], "cgroup.freeze", "0", false);
        snprintf(path, sizeof path, "%s/cgroup.procs", cgroups[i]);
        if (all) kill_listed(path);
    }
}

// Reap until no child is left; true while some live.
static bool reap(void) {
    for (;;) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid == 0) return true;
        if (pid < 0 && errno != EINTR) return false;
    }
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)at;
    kind == FTW_DP ? rmdir(path) : unlink(path);
    return 0;
}

static int remove_below(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)at;
    return kind == FTW_DP && rmdir(path) < 0 && errno == EBUSY;
}

// Remove a control group; false while something lives in it. Some runtimes make groups of their own
// below ours: only then it is worth looking at the files, which cannot be unlinked, only left.
static bool remove_group(const char *group) {
    if (rmdir(group) == 0 || errno == ENOENT) return true;
    return nftw(group, remove_below, 32, FTW_DEPTH | FTW_PHYS) <= 0;
}

static void clean_up(const char *state) {
    for (int i = 0; i < num_mounts; i++) umount2(mounts[i], MNT_DETACH);  // with all that is below
    int left = 0;
    for (int round = 0; round < 5000; round++) {  // a dying process leaves its group a little later
        left = 0;
        for (int i = 0; i < num_cgroups; i++) left += !remove_group(cgroups[i]);
        for (int i = 0; i < num_residues; i++) left += !remove_group(residues[i]);
        if (!left) break;
        kill_children(true);
        usleep(2000);
    }
    if (left) return;  // the directory stays, so that a sweep finds the groups
    nftw(state, remove_entry, 32, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

// Take what the creator says: a descriptor to restore with, -1 for "wait", or -2 once it is gone.
static int hear_creator(void) {
    char byte = 0, room[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room,
                             .msg_controllen = sizeof room};
    if (recvmsg(LIFE_FD, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) return -2;
    struct cmsghdr *given = CMSG_FIRSTHDR(&message);
    int fd = -1;
    if (byte == 'r' && given && given->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(given), sizeof fd);
    return byte == 'w' ? -1 : byte == 'r' ? fd : -2;
}

// Wait for the container's end. Returns true if a checkpoint ended it and it is to be restored, with
// the agent's new stream as descriptor 0.
static bool wait_for_end(const char *state, bool life, int signal_fd, bool can_restore) {
    struct timespec began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    struct pollfd fds[2] = {{signal_fd, POLLIN, 0}, {life ? LIFE_FD : -1, POLLIN, 0}};
    bool dying = false, waiting = false;
    int stream = -1, round = 0;
    while (reap() || (can_restore && waiting && !dying && stream < 0)) {
        if (dying) kill_children(round++ > 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long left = ttl_ms - (now.tv_sec - began.tv_sec) * 1000 - (now.tv_nsec - began.tv_nsec) / 1000000;
        if (ttl_ms >= 0 && left <= 0) dying = true;
        int wait_ms = dying ? 5 : ttl_ms < 0 ? -1 : left > 3600000 ? 3600000 : (int)left;
        if (poll(fds, 2, wait_ms) < 0 && errno != EINTR) break;
        struct signalfd_siginfo info;
        while (read(signal_fd, &info, sizeof info) > 0)
            if (info.ssi_signo != SIGCHLD) dying = true;
        if (!fds[1].revents) continue;
        int heard = hear_creator();
        if (heard >= 0) stream = heard;
        waiting = heard >= -1;
        if (!waiting) dying = true, fds[1].fd = -1;
    }
    if (dying || stream < 0) return false;
    char path[4096];  // what the runtime remembers is of the ended container
    snprintf(path, sizeof path, "%s/runtime", state);
    nftw(path, remove_entry, 32, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    if (stream == 0) fcntl(0, F_SETFD, 0);
    else dup2(stream, 0), close(stream);
    return true;
}

static void start_runtime(char **command, const sigset_t *watched, int guard) {
    pid_t runtime = vfork();  // nothing is copied that the next program throws away
    if (runtime == 0) {
        sigprocmask(SIG_UNBLOCK, watched, NULL);
        for (int i = 0; i < num_cgroups; i++) join(cgroups[i]);
        dup2(guard, 1);
        execvp(command[0], command);
        fail("run", command[0]);
    }
    if (runtime < 0) dprintf(2, "shim: fork: %s\n", strerror(errno));
}

static int own(int argc, char **argv) {
    const char *state = argv[1];
    setsid();
    char lock_path[4096];
    snprintf(lock_path, sizeof lock_path, "%s/lock", state);
    int lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) fail("lock", lock_path);
    dprintf(lock, "%d\n", getpid());
    bool life = false;
    int command = prepare(argc, argv, &life);
    if (life) fcntl(LIFE_FD, F_SETFD, FD_CLOEXEC);
    sigset_t watched;
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD), sigaddset(&watched, SIGTERM), sigaddset(&watched, SIGINT);
    sigaddset(&watched, SIGHUP);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int signal_fd = signalfd(-1, &watched, SFD_NONBLOCK | SFD_CLOEXEC);
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    int guard[2];
    if (pipe2(guard, O_CLOEXEC) < 0) fail("pipe", "guard");
    char **again = NULL;
    for (int i = command; i < argc; i++)
        if (!strcmp(argv[i], "--again")) argv[i] = NULL, again = argv + i + 1, i = argc;
    char **next = argv + command, go;
    if (waits && read(LIFE_FD, &go, 1) != 1) return clean_up(state), 1;
    if (!life) close(LIFE_FD);
    do {
        start_runtime(next, &watched, guard[0]);
        close(0);  // from here the socket lives as long as the agent does
        next = again;
    } while (wait_for_end(state, life, signal_fd, again != NULL));
    clean_up(state);
    return 0;
}

// Take one message: its size, and the descriptors in it; 0 when nobody is left who could send one.
// A sender who is another user by now, and kept the socket, gets nothing: what runs here is ours.
static ssize_t take_request(char *text, int *fds, int *count) {
    char room[CMSG_SPACE(GIVEN_FDS * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
    struct iovec part = {text, MAX_REQUEST};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room,
                             .msg_controllen = sizeof room};
    ssize_t size = recvmsg(0, &message, MSG_CMSG_CLOEXEC);
    bool trusted = false;
    *count = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); size > 0 && c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_type == SCM_RIGHTS) {  // more than fit are never delivered
            *count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof *fds);
            if (*count > GIVEN_FDS) _exit(1);
            memcpy(fds, CMSG_DATA(c), *count * sizeof *fds);
        }
        if (c->cmsg_type == SCM_CREDENTIALS) {
            struct ucred sender;
            memcpy(&sender, CMSG_DATA(c), sizeof sender);
            trusted = sender.uid == getuid();
        }
    }
    bool whole = size > 0 && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && !text[size - 1];
    if (size <= 0 || (trusted && whole && *count >= 3)) return size;
    while (*count) close(fds[--*count]);
    errno = EAGAIN;
    return -1;
}

// Fork an owner for each message on descriptor 0, so that a start does not wait for a program to be
// loaded. A message is the arguments, each with its final zero, and the descriptors 0, 2, 3 and, if
// there are so many, 4. Returns in the owner, with its arguments; ends with the last sender.
static int spawn_on_request(char **argv) {
    static char text[MAX_REQUEST];
    int fds[GIVEN_FDS], count, argc = 1;
    signal(SIGCHLD, SIG_IGN);  // nobody waits for owners
    umask(022);
    if (setsid() < 0 || chdir("/") < 0) return 0;
    close_range(3, ~0u, 0);
    for (;;) {
        ssize_t size = take_request(text, fds, &count);
        if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR)) _exit(0);
        if (size < 0) continue;
        pid_t owner = fork();
        if (owner < 0) dprintf(fds[1], "shim: fork: %s\n", strerror(errno));
        if (owner == 0) {
            signal(SIGCHLD, SIG_DFL);
            for (char *at = text; at < text + size && argc < MAX_ARGUMENTS; at += strlen(at) + 1)
                argv[argc++] = at;
            argv[argc] = NULL;
            const int numbers[GIVEN_FDS] = {0, 2, LIFE_FD, LIFE_FD + 1};
            // They arrived in this order above the three that were open: none is lost on the way.
            for (int i = 0; i < count; i++) dup2(fds[i], numbers[i]);
            close_range(numbers[count - 1] + 1, ~0u, 0);
            return argc;
        }
        while (count) close(fds[--count]);
    }
}

int main(int argc, char **argv) {
    static char *arguments[MAX_ARGUMENTS + 1];
    bool spawns = argc == 2 && !strcmp(argv[1], "--spawn");
    if (argc < 4 && !spawns) return dprintf(2, "shim: see the head of shim.c\n"), 2;
    pid_t background = fork();  // the creator reaps this process at once
    if (background != 0) _exit(background < 0);
    if (!spawns) return own(argc, argv);
    arguments[0] = argv[0];
    argc = spawn_on_request(arguments);
    return argc < 4 ? 2 : own(argc, arguments);
}
