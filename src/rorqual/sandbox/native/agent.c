// The process inside every sandbox: first process of a container or a service of a guest machine.
// It runs commands, moves their bytes, kills their trees, and keeps a journal of what it was asked.
//
// Usage: agent [--listen FD | --vsock PORT | --stream FD | --device PATH | --port NAME]
//              [--guard FD] [--linger MS] [--ttl MS]
//   --listen   accept connections on an inherited listening unix socket (default, FD 0)
//   --vsock    accept connections on this port of a guest machine's socket device
//   --stream   talk over one inherited descriptor; --device over a character device (virtio-serial)
//   --port     over the virtio-serial port of this name, once there is one: for guests of their own
//   --guard    leave when this inherited pipe closes: whoever cleans up after us has died
//   --linger   leave after this long without a connection (-1: never); --ttl leave after this long
//
// Wire format, little endian: u32 payload size, u8 type, u32 stream, payload. A request's payload
// is a list of fields: u8 tag, u32 size, bytes. The host side and the meaning of each type are in
// wire.py. Output is numbered by byte offset and kept until the host acknowledges it, so that a
// host which lost its connection (or its life) continues where it stopped, without loss or repeat.
#define _GNU_SOURCE
#include <net/if.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <linux/random.h>
#include <linux/vm_sockets.h>

#include "confine.h"
#include "files.h"

enum {
    WINDOW = 1 << 20,          // unacknowledged bytes kept per direction of one command
    CHUNK = 1 << 16,           // largest data frame
    MAX_FRAME = 4 << 20,       // largest request
    OUTBOX = 1 << 18,          // stop producing for a connection above this
    MAX_CONNECTIONS = 16,
    MAX_COMMANDS = 4096,       // running or remembered
    MAX_ARGUMENTS = 16384,
    FIRST_CONNECTION_MS = 15000,
};

enum reason { EXITED, SIGNALLED, TIMED_OUT, KILLED, NOT_STARTED };
enum { FLAG_PTY = 1, FLAG_KEEP = 2, FLAG_CONFINE = 4, FLAG_MERGE = 8 };
enum { STARTED = 1, FAILED, FINISHED };  // messages of the monitor

struct ring {
    unsigned char *data;  // WINDOW bytes, allocated with the first byte
    uint64_t start, end;  // offsets of the first kept byte and of the next one
};

struct output {
    int fd;
    struct ring kept;
    uint64_t sent;
    bool discard;  // the command is over; a background process of it still writes
};

struct connection {
    int fd;
    unsigned char *in, *out;
    size_t in_size, in_capacity, out_start, out_size, out_capacity;
    // held: the host asked for silence until it says more, on this connection or, since a saved
    // machine loses its connections, on the next one, which takes this one's place and commands
    bool device, held;
};

struct command {
    char id[80];
    int connection;  // index, or -1 while no host listens
    uint32_t stream, flags;
    pid_t monitor, pid;
    int status_fd, input_fd;
    struct output outputs[2];
    struct ring input;
    bool input_ended, finished, reported, acknowledged;
    uint64_t input_credited;
    int64_t started_ms, deadline_ms;
    int code, error;
    char stage;
    enum reason reason;
    uint64_t user_us, system_us, max_rss_kb, wall_ms;
    struct command *next;
};

struct status_message {
    int32_t kind, a, b;
    uint64_t user_us, system_us, max_rss_kb;
};

struct request {
    char id[80], *builtin, *directory, *user;
    char *argv[MAX_ARGUMENTS], *envp[MAX_ARGUMENTS];
    int argc, envc, listener;
    uint32_t flags;
    int64_t timeout_ms;
    uint16_t rows, columns;
};

struct listener { int port, fd; };

static struct connection connections[MAX_CONNECTIONS];
static struct command *commands;
static struct listener listeners[64];
static int num_commands, num_listeners;
static int64_t linger_ms = 0, ttl_deadline_ms = -1, alone_since_ms;
static bool was_connected, stopping, adopts_orphans;
static char boot_id[33];

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

// ---- rings -------------------------------------------------------------------------------------
static size_t ring_room(const struct ring *r) { return WINDOW - (size_t)(r->end - r->start); }

static bool ring_ready(struct ring *r) {
    if (r->data) return true;
    void *p = mmap(NULL, WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    r->data = p == MAP_FAILED ? NULL : p;
    return r->data != NULL;
}

static void ring_free(struct ring *r) {
    if (r->data) munmap(r->data, WINDOW);
    r->data = NULL;
}

// The longest run of bytes at `offset` that does not wrap.
static size_t ring_span(const struct ring *r, uint64_t offset, unsigned char **at) {
    size_t position = offset % WINDOW, size = (size_t)(r->end - offset);
    *at = r->data + position;
    return size < WINDOW - position ? size : WINDOW - position;
}

// ---- frames out --------------------------------------------------------------------------------
static void drop_connection(int index);
static void detach_commands(int index);

static bool reserve(unsigned char **buffer, size_t *capacity, size_t needed) {
    if (needed <= *capacity) return true;
    size_t larger = *capacity ? *capacity : 4096;
    while (larger < needed) larger *= 2;
    unsigned char *p = realloc(*buffer, larger);
    if (!p) return false;
    *buffer = p;
    *capacity = larger;
    return true;
}

static void send_frame(int index, char type, uint32_t stream, const void *head, size_t head_size,
                       const void *body, size_t body_size) {
    if (index < 0 || connections[index].fd < 0) return;
    struct connection *c = &connections[index];
    uint32_t size = (uint32_t)(head_size + body_size);
    if (c->out_start && c->out_start == c->out_size) c->out_start = c->out_size = 0;
    if (!reserve(&c->out, &c->out_capacity, c->out_size + 9 + size)) return drop_connection(index);
    unsigned char *p = c->out + c->out_size;
    memcpy(p, &size, 4);
    p[4] = (unsigned char)type;
    memcpy(p + 5, &stream, 4);
    memcpy(p + 9, head, head_size);
    if (body_size) memcpy(p + 9 + head_size, body, body_size);
    c->out_size += 9 + size;
}

static void send_error(int index, uint32_t stream, int error, const char *text) {
    int32_t code = error;
    send_frame(index, 'E', stream, &code, 4, text, strlen(text));
}

static void flush_connection(int index) {
    struct connection *c = &connections[index];
    while (c->fd >= 0 && c->out_start < c->out_size) {
        ssize_t n = write(c->fd, c->out + c->out_start, c->out_size - c->out_start);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n < 0) return drop_connection(index);
        c->out_start += (size_t)n;
    }
    c->out_start = c->out_size = 0;
    if (c->out_capacity > 2 * OUTBOX) {  // give a burst's memory back
        free(c->out);
        c->out = NULL;
        c->out_capacity = 0;
    }
}

// ---- processes ---------------------------------------------------------------------------------
static pid_t parent_of(const char *pid, char *state) {
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = read(fd, line, sizeof line - 1);
    close(fd);
    if (n <= 0) return -1;
    line[n] = 0;
    char *p = strrchr(line, ')');  // the name before it may contain anything
    int parent;
    if (!p || sscanf(p + 1, " %c %d", state, &parent) != 2) return -1;
    return parent;
}

// Without sub-reapers (older gVisor) an orphan falls to this agent and no longer shows whose it was:
// then every orphan counts.
static bool is_orphan(pid_t pid, pid_t parent) {
    if (parent != getpid()) return false;
    for (struct command *c = commands; c; c = c->next)
        if (c->monitor == pid) return false;
    return true;
}

// Signal every descendant of `root` once; returns how many were still alive.
static int signal_descendants(pid_t root, int number) {
    struct entry { pid_t pid, parent; bool alive, below; } *all = NULL;
    size_t count = 0, capacity = 0;
    DIR *proc = opendir("/proc");
    if (!proc) return 0;
    for (struct dirent *e; (e = readdir(proc));) {
        char state = 0;
        if (e->d_name[0] < '1' || e->d_name[0] > '9') continue;
        pid_t parent = parent_of(e->d_name, &state);
        if (parent < 0) continue;
        if (count == capacity) {
            capacity = capacity ? capacity * 2 : 64;
            struct entry *larger = realloc(all, capacity * sizeof *all);
            if (!larger) break;
            all = larger;
        }
        all[count++] = (struct entry){atoi(e->d_name), parent, state != 'Z' && state != 'X', false};
    }
    closedir(proc);
    int alive = 0;
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = 0; i < count; i++) {
            if (all[i].below) continue;
            bool below = all[i].parent == root || (!adopts_orphans && is_orphan(all[i].pid, all[i].parent));
            for (size_t j = 0; !below && j < count; j++)
                below = all[j].below && all[j].pid == all[i].parent;
            if (!below) continue;
            all[i].below = changed = true;
            if (!all[i].alive) continue;
            alive++;
            kill(all[i].pid, number);
        }
    }
    free(all);
    return alive;
}

// Kill a command and everything it started, also what left its session or was orphaned: orphans
// fall to the monitor, which stands still meanwhile so that it cannot leave and lose them.
static void kill_tree(struct command *c, enum reason reason) {
    if (c->finished || c->monitor <= 0) return;
    if (c->reason == EXITED) c->reason = reason;
    kill(c->monitor, SIGSTOP);
    bool clean = false;
    for (int round = 0; !clean && round < 200; round++)
        clean = signal_descendants(c->monitor, SIGKILL) == 0;
    // A fork bomb can outrun one scan after another. kill(-1) signals all others in one step under
    // the kernel's task lock; only this agent survives it.
    if (!clean && getpid() == 1) kill(-1, SIGKILL);
    kill(c->monitor, SIGCONT);
}

static _Noreturn void child_failed(int status_fd, char stage) {
    struct status_message m = {.kind = FAILED, .a = errno, .b = stage};
    write_all(status_fd, &m, sizeof m);
    _exit(127);
}

// "name", "uid" or "uid:gid", looked up in the sandbox's own passwd file.
static int find_user(const char *user, uid_t *uid, gid_t *gid, char *home, size_t home_size) {
    char line[1024], *end;
    long number = strtol(user, &end, 10);
    bool numeric = end != user && (*end == 0 || *end == ':');
    *uid = *gid = (uid_t)number;
    if (numeric && *end == ':') *gid = (gid_t)atoi(end + 1);
    snprintf(home, home_size, "/");
    FILE *file = fopen("/etc/passwd", "re");
    bool found = false;
    while (file && !found && fgets(line, sizeof line, file)) {
        char *rest = line, *name = strsep(&rest, ":");
        strsep(&rest, ":");
        char *u = strsep(&rest, ":"), *g = strsep(&rest, ":");
        strsep(&rest, ":");
        char *h = strsep(&rest, ":");
        if (!h) continue;
        found = numeric ? atol(u) == number : !strcmp(name, user);
        if (!found) continue;
        *uid = (uid_t)atoi(u);
        if (!(numeric && *end == ':')) *gid = (gid_t)atoi(g);
        snprintf(home, home_size, "%s", h);
    }
    if (file) fclose(file);
    if (numeric || found) return 0;
    errno = ENOENT;
    return -1;
}

static _Noreturn void run_child(struct request *r, int status_fd) {
    signal(SIGPIPE, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score >= 0) {  // under memory pressure the command dies, not the agent
        if (write(score, "500", 3) < 0) {}
        close(score);
    }
    uid_t uid = 0;
    gid_t gid = 0;
    char home[512] = "/root", home_variable[520];
    if (getuid() != 0) uid = getuid(), gid = getgid();
    if (r->user && find_user(r->user, &uid, &gid, home, sizeof home) < 0) child_failed(status_fd, 'u');
    uint64_t kept = 0;
    if (r->builtin && !r->user)
        kept = 1ull << CAP_DAC_OVERRIDE | 1ull << CAP_CHOWN | 1ull << CAP_FOWNER;
    if (!(r->flags & FLAG_CONFINE)) {
        if (setgroups(0, NULL) < 0 || setresgid(gid, gid, gid) < 0 || setresuid(uid, uid, uid) < 0)
            child_failed(status_fd, 'u');
    } else if (confine(uid, gid, kept) < 0) {
        child_failed(status_fd, 'c');
    }
    const char *directory = r->directory ? r->directory : r->builtin ? "/" : home;
    if (chdir(directory) < 0 && (r->directory || chdir("/") < 0)) child_failed(status_fd, 'd');
    if (r->builtin) _exit(run_builtin(r->builtin, r->argv, r->argc, r->listener) & 255);
    bool has_path = false, has_home = false;
    for (int i = 0; i < r->envc; i++) {
        if (!strncmp(r->envp[i], "PATH=", 5)) has_path = true, putenv(r->envp[i]);
        if (!strncmp(r->envp[i], "HOME=", 5)) has_home = true;
    }
    static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if (!has_path) r->envp[r->envc++] = path, putenv(path);
    snprintf(home_variable, sizeof home_variable, "HOME=%s", home);
    if (!has_home) r->envp[r->envc++] = home_variable;
    r->envp[r->envc] = NULL;
    execvpe(r->argv[0], r->argv, r->envp);
    child_failed(status_fd, 'x');
}

// Between the agent and one command: adopts the orphans below it and reports how it ended.
static _Noreturn void monitor(struct request *r, int in, int out, int err, int status_fd) {
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    int fds[5] = {in, out, err, status_fd, r->listener};
    for (int i = 0; i < 5; i++) {  // move what is needed above, so that nothing else stays open
        if (fds[i] >= 0) fds[i] = fcntl(fds[i], F_DUPFD, 100);
    }
    dup2(fds[0], 0), dup2(fds[1], 1), dup2(fds[2], 2);
    dup2(fds[3], 3), fcntl(3, F_SETFD, FD_CLOEXEC);
    if (r->listener >= 0) r->listener = dup2(fds[4], 4), fcntl(4, F_SETFD, FD_CLOEXEC);
    unsigned first = r->listener >= 0 ? 5 : 4;
    if (syscall(436 /* close_range */, first, ~0u, 0) < 0)
        for (unsigned fd = first; fd < 1024; fd++) close((int)fd);
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        if (r->flags & FLAG_PTY) ioctl(0, TIOCSCTTY, 0);
        run_child(r, 3);
    }
    close(0), close(1), close(2);
    struct status_message m = {.kind = STARTED, .a = pid};
    if (pid < 0) m.kind = FAILED, m.a = errno, m.b = 'f';
    write_all(3, &m, sizeof m);
    if (pid < 0) _exit(1);
    int status;
    struct rusage usage;
    for (pid_t ended;;) {
        ended = wait4(-1, &status, 0, &usage);
        if (ended == pid) break;
        if (ended < 0 && errno != EINTR) _exit(1);
    }
    m.kind = FINISHED;
    m.a = WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status);
    m.b = WIFEXITED(status) ? EXITED : SIGNALLED;
    m.user_us = (uint64_t)usage.ru_utime.tv_sec * 1000000 + (uint64_t)usage.ru_utime.tv_usec;
    m.system_us = (uint64_t)usage.ru_stime.tv_sec * 1000000 + (uint64_t)usage.ru_stime.tv_usec;
    m.max_rss_kb = (uint64_t)usage.ru_maxrss;
    write_all(3, &m, sizeof m);
    _exit(0);
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void forget(struct command *c) {
    for (struct command **p = &commands; *p; p = &(*p)->next) {
        if (*p != c) continue;
        *p = c->next;
        break;
    }
    close_fd(&c->status_fd), close_fd(&c->input_fd);
    for (int i = 0; i < 2; i++) close_fd(&c->outputs[i].fd), ring_free(&c->outputs[i].kept);
    ring_free(&c->input);
    free(c);
    num_commands--;
}

static struct command *find_command(const char *id) {
    for (struct command *c = commands; c; c = c->next)
        if (*id && !strcmp(c->id, id)) return c;
    return NULL;
}

static struct command *find_stream(int connection, uint32_t stream) {
    for (struct command *c = commands; c; c = c->next)
        if (c->connection == connection && c->stream == stream) return c;
    return NULL;
}

static void start_command(int index, uint32_t stream, struct request *r) {
    if (*r->id && find_command(r->id)) return send_error(index, stream, EEXIST, r->id);
    if (num_commands >= MAX_COMMANDS) return send_error(index, stream, EAGAIN, "too many commands");
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1}, status[2] = {-1, -1};
    struct command *c = calloc(1, sizeof *c);
    bool ok = c && pipe2(status, O_CLOEXEC) == 0;
    if (r->flags & FLAG_PTY) {
        struct winsize size = {.ws_row = r->rows, .ws_col = r->columns};
        ok = ok && openpty(&out[0], &out[1], NULL, NULL, &size) == 0;
        ok = ok && (in[1] = fcntl(out[0], F_DUPFD_CLOEXEC, 0)) >= 0;
        in[0] = err[1] = out[1];
    } else {
        ok = ok && pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0;
        if (r->flags & FLAG_MERGE) err[1] = out[1];
        else ok = ok && pipe2(err, O_CLOEXEC) == 0;
    }
    pid_t pid = ok ? fork() : -1;
    if (pid == 0) monitor(r, in[0], out[1], err[1], status[1]);
    int error = errno;
    if (in[0] >= 0 && in[0] != out[1]) close(in[0]);
    if (err[1] >= 0 && err[1] != out[1]) close(err[1]);
    if (out[1] >= 0) close(out[1]);
    if (status[1] >= 0) close(status[1]);
    if (pid < 0) {
        close_fd(&in[1]), close_fd(&out[0]), close_fd(&err[0]), close_fd(&status[0]);
        free(c);
        return send_error(index, stream, error, "cannot start a process");
    }
    memcpy(c->id, r->id, sizeof c->id);
    c->connection = index, c->stream = stream, c->flags = r->flags, c->monitor = pid;
    c->status_fd = status[0], c->input_fd = in[1];
    c->outputs[0].fd = out[0], c->outputs[1].fd = err[0];
    const int ours[4] = {in[1], out[0], err[0], status[0]};
    for (int i = 0; i < 4; i++)
        if (ours[i] >= 0) fcntl(ours[i], F_SETFL, O_NONBLOCK), fcntl(ours[i], F_SETFD, FD_CLOEXEC);
    c->started_ms = now_ms();
    c->deadline_ms = r->timeout_ms > 0 ? c->started_ms + r->timeout_ms : -1;
    c->next = commands;
    commands = c;
    num_commands++;
}

static void read_status(struct command *c) {
    struct status_message m;
    for (;;) {
        ssize_t n = read(c->status_fd, &m, sizeof m);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n != sizeof m) break;  // the monitor is gone
        if (m.kind == STARTED) c->pid = m.a;
        if (m.kind == FAILED) c->reason = NOT_STARTED, c->error = m.a, c->stage = (char)m.b;
        if (m.kind == FINISHED) {
            c->code = m.a;
            if (c->reason == EXITED) c->reason = (enum reason)m.b;
            c->user_us = m.user_us, c->system_us = m.system_us, c->max_rss_kb = m.max_rss_kb;
            c->finished = true;
        }
    }
    if (!c->finished && c->reason == EXITED) c->reason = KILLED, c->code = SIGKILL;
    c->finished = true;
    c->wall_ms = (uint64_t)(now_ms() - c->started_ms);
    close_fd(&c->status_fd);
    close_fd(&c->input_fd);
}

// ---- bytes of commands -------------------------------------------------------------------------
static void read_output(struct command *c, struct output *o) {
    if (o->discard) {
        unsigned char waste[CHUNK];
        ssize_t n = read(o->fd, waste, sizeof waste);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) close_fd(&o->fd);
        return;
    }
    while (o->fd >= 0 && ring_room(&o->kept) && ring_ready(&o->kept)) {
        size_t position = o->kept.end % WINDOW, room = ring_room(&o->kept);
        if (room > WINDOW - position) room = WINDOW - position;
        ssize_t n = read(o->fd, o->kept.data + position, room);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) {
            if (c->finished && c->status_fd < 0) o->discard = true;  // all it wrote itself is here
            return;
        }
        if (n <= 0) return close_fd(&o->fd);
        o->kept.end += (uint64_t)n;
        if ((size_t)n < room && !c->finished) return;
    }
}

static void write_input(struct command *c) {
    while (c->input_fd >= 0 && c->input.start < c->input.end) {
        unsigned char *at;
        size_t size = ring_span(&c->input, c->input.start, &at);
        ssize_t n = write(c->input_fd, at, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) {  // nobody reads: the rest is dropped, as by a pipe
            close_fd(&c->input_fd);
            break;
        }
        c->input.start += (uint64_t)n;
    }
    if (c->input_fd < 0) c->input.start = c->input.end;
    if (c->input_ended && c->input.start == c->input.end) {
        if (c->flags & FLAG_PTY && c->input_fd >= 0 && write(c->input_fd, "\4", 1) < 0) {}
        close_fd(&c->input_fd);
    }
    bool held = c->connection >= 0 && connections[c->connection].held;
    if (!held && (c->input.start - c->input_credited >= CHUNK || c->input.start == c->input.end)) {
        if (c->input_credited != c->input.start)
            send_frame(c->connection, 'C', c->stream, &c->input.start, 8, NULL, 0);
        c->input_credited = c->input.start;
    }
}

static void send_exit(struct command *c) {
    struct __attribute__((packed)) {
        int32_t code, reason, error;
        char stage;
        uint64_t ends[2], user_us, system_us, max_rss_kb, wall_ms;
    } head = {c->code, c->reason, c->error, c->stage, {c->outputs[0].kept.end, c->outputs[1].kept.end},
              c->user_us, c->system_us, c->max_rss_kb, c->wall_ms};
    send_frame(c->connection, 'X', c->stream, &head, sizeof head, NULL, 0);
    c->reported = true;
}

// Send what is new; returns true when the command can be forgotten.
static bool advance(struct command *c) {
    bool drained = true;
    for (int i = 0; i < 2; i++) {
        struct output *o = &c->outputs[i];
        if (c->finished && o->fd >= 0 && !o->discard) read_output(c, o);
        if (o->fd >= 0 && !o->discard) drained = false;
        while (c->connection >= 0 && !connections[c->connection].held && o->sent < o->kept.end) {
            struct connection *to = &connections[c->connection];
            if (to->out_size - to->out_start > OUTBOX) break;
            struct __attribute__((packed)) { uint8_t channel; uint64_t offset; } head = {
                (uint8_t)(i + 1), o->sent};
            unsigned char *at;
            size_t size = ring_span(&o->kept, o->sent, &at);
            if (size > CHUNK) size = CHUNK;
            send_frame(c->connection, 'D', c->stream, &head, sizeof head, at, size);
            o->sent += size;
        }
        if (o->sent < o->kept.end) drained = false;
    }
    bool over = c->finished && c->status_fd < 0 && drained;
    bool can_send = c->connection >= 0 && !connections[c->connection].held;
    if (over && can_send && !c->reported) send_exit(c);
    bool quiet = c->outputs[0].fd < 0 && c->outputs[1].fd < 0;
    bool unwanted = c->acknowledged || (!*c->id && (c->reported || c->connection < 0));
    return c->finished && c->status_fd < 0 && quiet && unwanted;
}

// ---- requests ----------------------------------------------------------------------------------
static bool next_field(unsigned char **p, unsigned char *end, char *tag, char **value, uint32_t *size) {
    if (end - *p < 5) return false;
    *tag = (char)**p;
    memcpy(size, *p + 1, 4);
    if (*size > (size_t)(end - *p - 5)) return false;
    *value = (char *)*p + 5;
    *p += 5 + *size;
    return true;
}

static int listen_on(int port) {
    for (int i = 0; i < num_listeners; i++)
        if (listeners[i].port == port) return listeners[i].fd;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    if (fd < 0 || num_listeners == 64) return close_fd(&fd), -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 128) < 0)
        return close_fd(&fd), -1;
    listeners[num_listeners++] = (struct listener){port, fd};
    return fd;
}

static void handle_exec(int index, uint32_t stream, unsigned char *p, unsigned char *end) {
    static struct request r;  // large, and one at a time
    memset(&r, 0, offsetof(struct request, argv));
    r.argc = r.envc = 0, r.flags = FLAG_CONFINE, r.timeout_ms = 0, r.rows = 24, r.columns = 80;
    r.listener = -1;
    char tag, *value;
    uint32_t size;
    while (next_field(&p, end, &tag, &value, &size)) {  // values carry their own final zero
        uint64_t number = 0;
        if (size == 8) memcpy(&number, value, 8);
        else if (!size || value[size - 1]) return send_error(index, stream, EINVAL, "field");
        switch (tag) {
            case 'I': snprintf(r.id, sizeof r.id, "%s", value); break;
            case 'B': r.builtin = value; break;
            case 'A':
                if (r.argc == MAX_ARGUMENTS - 1) return send_error(index, stream, E2BIG, "arguments");
                r.argv[r.argc++] = value;
                break;
            case 'V':
                if (r.envc == MAX_ARGUMENTS - 3) return send_error(index, stream, E2BIG, "variables");
                r.envp[r.envc++] = value;
                break;
            case 'W': r.directory = value; break;
            case 'U': r.user = value; break;
            case 't': r.timeout_ms = (int64_t)number; break;
            case 'f': r.flags = (uint32_t)number; break;
            case 'z': r.rows = (uint16_t)(number >> 16), r.columns = (uint16_t)number; break;
            default: return send_error(index, stream, EINVAL, "unknown field");
        }
    }
    r.argv[r.argc] = NULL;
    if (p != end || (!r.argc && !r.builtin)) return send_error(index, stream, EINVAL, "request");
    if (r.builtin && !strcmp(r.builtin, "accept")) {
        r.listener = r.argc == 1 ? listen_on(atoi(r.argv[0])) : -1;
        if (r.listener < 0) return send_error(index, stream, errno, "cannot listen");
    }
    start_command(index, stream, &r);
}

// Take over a command by id: the host says how many bytes of each output it has.
static void handle_attach(int index, uint32_t stream, unsigned char *p, size_t size) {
    char id[80] = "";
    if (size < 17 || size - 16 > sizeof id) return send_error(index, stream, EINVAL, "attach");
    memcpy(id, p + 16, size - 16);
    id[sizeof id - 1] = 0;
    struct command *c = find_command(id);
    if (!c) return send_error(index, stream, ENOENT, id);
    c->connection = index, c->stream = stream, c->reported = false;
    for (int i = 0; i < 2; i++) {
        struct output *o = &c->outputs[i];
        uint64_t have;
        memcpy(&have, p + 8 * i, 8);
        if (have > o->kept.end || have < o->kept.start)
            return send_error(index, stream, ERANGE, "output offset");
        o->sent = o->kept.start = have;
    }
    uint64_t input[2] = {c->input.end, c->input.start};
    send_frame(index, 'A', stream, input, sizeof input, NULL, 0);
}

static void apply_credit(struct command *c, unsigned char *p, size_t size) {
    uint64_t offset;
    if (size != 9 || p[0] < 1 || p[0] > 2) return;
    memcpy(&offset, p + 1, 8);
    struct output *o = &c->outputs[p[0] - 1];
    if (offset > o->kept.start && offset <= o->sent) o->kept.start = offset;
}

static void take_input(struct command *c, unsigned char *p, size_t size) {
    uint64_t offset;
    if (size < 8) return;
    memcpy(&offset, p, 8);
    p += 8, size -= 8;
    if (offset != c->input.end || c->input_ended || size > ring_room(&c->input)) return;
    for (size_t done = 0; done < size && ring_ready(&c->input);) {
        size_t position = c->input.end % WINDOW, span = WINDOW - position;
        if (span > size - done) span = size - done;
        memcpy(c->input.data + position, p + done, span);
        c->input.end += span, done += span;
    }
    write_input(c);
}

// After a resume or a fork this guest must not share its predecessor's identity or random state.
static void handle_renew(int index, uint32_t stream, unsigned char *p, unsigned char *end) {
    char tag, *value, done[8] = "";
    uint32_t size;
    size_t n = 0;
    while (next_field(&p, end, &tag, &value, &size)) {
        bool ok = false;
        if (tag == 'H') ok = sethostname(value, size ? size - 1 : 0) == 0;
        if (tag == 'T' && size == 8) {
            int64_t ns;
            memcpy(&ns, value, 8);
            struct timespec t = {ns / 1000000000, ns % 1000000000};
            ok = clock_settime(CLOCK_REALTIME, &t) == 0;
        }
        if (tag == 'M') {
            int fd = open("/etc/machine-id", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
            ok = fd >= 0 && write_all(fd, value, size ? size - 1 : 0) == 0;
            close_fd(&fd);
        }
        if (tag == 'S' && size <= 512) {
            struct { int bits, bytes; char data[512]; } pool = {(int)size * 8, (int)size, {0}};
            memcpy(pool.data, value, size);
            int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
            ok = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
            close_fd(&fd);
        }
        if (ok && n < sizeof done) done[n++] = tag;
    }
    send_frame(index, 'N', stream, done, n, NULL, 0);
}

static void greet(int index) {
    uint32_t version = 1;
    was_connected = true;
    send_frame(index, 'R', 0, &version, 4, boot_id, strlen(boot_id));
}

static void handle_frame(int index, char type, uint32_t stream, unsigned char *p, size_t size) {
    struct command *c = find_stream(index, stream);
    switch (type) {
        case 'x': return handle_exec(index, stream, p, p + size);
        case 'a': return handle_attach(index, stream, p, size);
        case 'n': return handle_renew(index, stream, p, p + size);
        case 'p': return send_frame(index, 'P', stream, p, size, NULL, 0);
        case 'h':  // a host opened a serial line, or the stream of a restored checkpoint
            connections[index].held = false;
            return detach_commands(index), greet(index);
        case 'z':  // nothing may be half sent while this process is checkpointed
            send_frame(index, 'Z', stream, NULL, 0, NULL, 0);
            connections[index].held = true;
            return;
        case 'y': connections[index].held = false; return;
        case 'q': stopping = true; return;
        case 'l': if (size == 8) memcpy(&linger_ms, p, 8); return;
        case 'f': {
            char id[80] = "";
            if (size >= sizeof id) return;
            memcpy(id, p, size);
            if ((c = find_command(id))) c->acknowledged = true;
            return;
        }
    }
    if (!c) return;  // it ended while the frame was on its way
    if (type == 'd') take_input(c, p, size);
    if (type == 'e') c->input_ended = true, write_input(c);
    if (type == 'c') apply_credit(c, p, size);
    if (type == 'k') kill_tree(c, KILLED);
    if (type == 's' && size == 4 && c->pid > 0) {
        int32_t number;
        memcpy(&number, p, 4);
        if (!c->finished && kill(-c->pid, number) < 0) kill(c->pid, number);
    }
    if (type == 'w' && size == 4 && c->flags & FLAG_PTY && c->outputs[0].fd >= 0) {
        struct winsize window = {0};
        memcpy(&window, p, 4);
        ioctl(c->outputs[0].fd, TIOCSWINSZ, &window);
    }
}

// ---- connections -------------------------------------------------------------------------------
// The host behind a connection is gone: commands it did not ask to keep end with it.
static void detach_commands(int index) {
    connections[index].out_size = connections[index].out_start = 0;
    for (struct command *c = commands; c; c = c->next) {
        if (c->connection != index) continue;
        c->connection = -1;
        for (int i = 0; i < 2; i++) c->outputs[i].sent = c->outputs[i].kept.start;
        if (!(c->flags & FLAG_KEEP)) kill_tree(c, KILLED);
    }
}

// What is left is its place, and that it is held.
static void empty_connection(struct connection *c) {
    close_fd(&c->fd);
    free(c->in), free(c->out);
    *c = (struct connection){.fd = -1, .held = c->held};
}

static void drop_connection(int index) {
    struct connection *gone = &connections[index];
    if (gone->fd < 0) return;
    if (!gone->held) detach_commands(index);
    if (gone->device) return;  // a serial line never ends: the next host says hello on it
    empty_connection(gone);
    alone_since_ms = now_ms();
}

static int add_connection(int fd, bool device) {
    int place = -1;
    for (int i = MAX_CONNECTIONS - 1; i >= 0; i--)
        if (connections[i].fd < 0 && !connections[i].held) place = i;
    for (int i = 0; i < MAX_CONNECTIONS; i++)
        if (connections[i].held && !connections[i].device) place = i;
    if (place < 0) return close(fd), -1;
    empty_connection(&connections[place]);
    struct connection *c = &connections[place];
    c->fd = fd, c->device = device;
    fcntl(fd, F_SETFL, O_NONBLOCK), fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (!device) greet(place);
    return place;
}

static void read_connection(int index) {
    struct connection *c = &connections[index];
    for (;;) {
        if (!reserve(&c->in, &c->in_capacity, c->in_size + CHUNK)) return drop_connection(index);
        ssize_t n = read(c->fd, c->in + c->in_size, c->in_capacity - c->in_size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0 && c->device) break;
        if (n <= 0) return drop_connection(index);
        c->in_size += (size_t)n;
        size_t used = 0;
        while (c->in_size - used >= 9) {
            uint32_t size, stream;
            unsigned char *p = c->in + used;
            memcpy(&size, p, 4);
            memcpy(&stream, p + 5, 4);
            if (size > MAX_FRAME) return drop_connection(index);
            if (c->in_size - used - 9 < size) break;
            handle_frame(index, (char)p[4], stream, p + 9, size);
            if (c->fd < 0) return;
            used += 9 + size;
        }
        memmove(c->in, c->in + used, c->in_size - used);
        c->in_size -= used;
    }
    if (c->in_size == 0 && c->in_capacity > 2 * CHUNK) {
        free(c->in);
        c->in = NULL, c->in_capacity = 0;
    }
}

// ---- main loop ---------------------------------------------------------------------------------
static int64_t sooner(int64_t a, int64_t b) { return a < 0 ? b : b < 0 ? a : a < b ? a : b; }

static bool is_alone(void) {
    for (int i = 0; i < MAX_CONNECTIONS; i++)
        if (connections[i].fd >= 0) return false;
    return true;
}

// Kill what is overdue, leave when asked to; returns ms until the next moment of interest or -1.
static int64_t check_time(void) {
    int64_t now = now_ms(), next = ttl_deadline_ms;
    if (ttl_deadline_ms >= 0 && now >= ttl_deadline_ms) stopping = true;
    if (linger_ms >= 0 && is_alone()) {
        int64_t wait = was_connected || linger_ms > FIRST_CONNECTION_MS ? linger_ms : FIRST_CONNECTION_MS;
        if (now - alone_since_ms >= wait) stopping = true;
        next = sooner(next, alone_since_ms + wait);
    }
    for (struct command *c = commands; c; c = c->next) {
        if (c->finished || c->deadline_ms < 0) continue;
        if (now >= c->deadline_ms) {
            c->deadline_ms = -1;
            kill_tree(c, TIMED_OUT);
        } else {
            next = sooner(next, c->deadline_ms);
        }
    }
    return next < 0 ? -1 : next > now ? next - now : 0;
}

static void watch(struct pollfd *fds, nfds_t *n, int fd, short events) {
    if (fd >= 0) fds[(*n)++] = (struct pollfd){fd, events, 0};
}

static void loop(int listen_fd, int guard_fd, int signal_fd) {
    static struct pollfd fds[3 + MAX_CONNECTIONS + 4 * MAX_COMMANDS];
    while (!stopping) {
        nfds_t n = 0;
        fds[n++] = (struct pollfd){signal_fd, POLLIN, 0};
        fds[n++] = (struct pollfd){listen_fd, POLLIN, 0};
        fds[n++] = (struct pollfd){guard_fd, POLLIN, 0};
        for (int i = 0; i < MAX_CONNECTIONS; i++) {
            struct connection *c = &connections[i];
            short events = POLLIN | (c->out_start < c->out_size ? POLLOUT : 0);
            fds[n++] = (struct pollfd){c->fd, events, 0};
        }
        for (struct command *c = commands; c; c = c->next) {
            watch(fds, &n, c->status_fd, POLLIN);
            for (int i = 0; i < 2; i++) {
                struct output *o = &c->outputs[i];
                if (o->discard || ring_room(&o->kept) > 0) watch(fds, &n, o->fd, POLLIN);
            }
            if (c->input.start < c->input.end) watch(fds, &n, c->input_fd, POLLOUT);
        }
        int64_t wait = check_time();
        if (stopping) break;
        if (poll(fds, n, wait < 0 || wait > 60000 ? 60000 : (int)wait) < 0 && errno != EINTR) return;
        n = 3;
        if (fds[2].revents) return;
        if (fds[0].revents) {
            struct signalfd_siginfo info;
            while (read(signal_fd, &info, sizeof info) > 0) {
                if (info.ssi_signo == SIGTERM) stopping = true;
            }
            while (waitpid(-1, NULL, WNOHANG) > 0) {}
        }
        for (int i = 0; i < MAX_CONNECTIONS; i++) {
            short got = fds[n++].revents;
            if (connections[i].fd < 0 || !got) continue;
            if (got & POLLOUT) flush_connection(i);
            // A serial line without a host reports a hang-up for as long as there is none.
            if (connections[i].device && got & POLLHUP && !(got & POLLIN)) usleep(5000);
            else if (connections[i].fd >= 0 && got & ~POLLOUT) read_connection(i);
        }
        for (struct command *c = commands, *next; c; c = next) {
            next = c->next;
            if (c->status_fd >= 0) read_status(c);
            for (int i = 0; i < 2; i++)
                if (c->outputs[i].fd >= 0) read_output(c, &c->outputs[i]);
            if (c->input.start < c->input.end || c->input_ended) write_input(c);
            if (advance(c)) forget(c);
        }
        if (fds[1].revents & POLLIN) {
            int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd >= 0) add_connection(fd, false);
        }
        for (int i = 0; i < MAX_CONNECTIONS; i++) flush_connection(i);
    }
}

static void raise_loopback(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) ioctl(fd, SIOCSIFFLAGS, &request), close(fd);
}

static void name_this_boot(void) {
    unsigned char random[16] = {0};
    if (getrandom(random, sizeof random, 0) < 0) {}
    for (int i = 0; i < 16; i++) snprintf(boot_id + 2 * i, 3, "%02x", random[i]);
}

// A listening socket that the machine's host reaches; only root may take a port below 1024.
static int listen_on_vsock(unsigned port) {
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8) < 0)
        return close_fd(&fd), -1;
    return fd;
}

// The number in a port's device name depends on the machine; its name does not.
static int open_port(const char *wanted) {
    for (;; usleep(20000)) {
        int fd = -1, error = ENOENT;
        DIR *ports = opendir("/sys/class/virtio-ports");
        for (struct dirent *e; fd < 0 && ports && (e = readdir(ports));) {
            char path[300], name[128] = "";
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
            FILE *file = fopen(path, "re");
            if (!file) continue;
            if (!fgets(name, sizeof name, file)) name[0] = 0;
            fclose(file);
            name[strcspn(name, "\n")] = 0;
            if (strcmp(name, wanted)) continue;
            snprintf(path, sizeof path, "/dev/%s", e->d_name);
            fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd < 0) error = errno;
        }
        if (ports) closedir(ports);
        errno = error;
        if (fd >= 0 || error != ENOENT) return fd;
    }
}

int main(int argc, char **argv) {
    int listen_fd = 0, stream_fd = -1, guard_fd = -1;
    bool device = false;
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--listen")) listen_fd = atoi(value);
        else if (!strcmp(name, "--vsock")) listen_fd = listen_on_vsock((unsigned)atoi(value));
        else if (!strcmp(name, "--stream")) stream_fd = atoi(value);
        else if (!strcmp(name, "--device")) stream_fd = open(value, O_RDWR | O_CLOEXEC), device = true;
        else if (!strcmp(name, "--port")) stream_fd = open_port(value), device = true;
        else if (!strcmp(name, "--guard")) guard_fd = atoi(value);
        else if (!strcmp(name, "--linger")) linger_ms = atoll(value);
        else if (!strcmp(name, "--ttl")) ttl_deadline_ms = now_ms() + atoll(value);
        else return dprintf(2, "agent: unknown option %s\n", name), 2;
    }
    if ((device && stream_fd < 0) || listen_fd < 0) return perror("agent"), 1;
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);  // no command can look into or trace this process
    signal(SIGPIPE, SIG_IGN);
    sigset_t watched;
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD), sigaddset(&watched, SIGTERM);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int signal_fd = signalfd(-1, &watched, SFD_NONBLOCK | SFD_CLOEXEC);
    for (int i = 0; i < MAX_CONNECTIONS; i++) connections[i].fd = -1;
    raise_loopback();
    uint64_t held = held_capabilities() & ~(1ull << CAP_NET_ADMIN);
    if (getpid() == 1 && !device) set_capabilities(held);
    int set = 0;
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    adopts_orphans = prctl(PR_GET_CHILD_SUBREAPER, &set, 0, 0, 0) == 0 && set;
    name_this_boot();
    alone_since_ms = now_ms();
    if (stream_fd >= 0) {
        listen_fd = -1;
        // An inherited stream is its own copy, so that descriptor 0 can be given away safely.
        if (!device) stream_fd = fcntl(stream_fd, F_DUPFD_CLOEXEC, 10);
        add_connection(stream_fd, device);
    } else {
        fcntl(listen_fd, F_SETFD, FD_CLOEXEC), fcntl(listen_fd, F_SETFL, O_NONBLOCK);
    }
    loop(listen_fd, guard_fd, signal_fd);
    return 0;
}
