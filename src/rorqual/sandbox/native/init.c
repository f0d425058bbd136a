// First program of a guest machine: puts the root together from disks and becomes the agent.
//
// It is /init of the initial memory file system, beside `agent` and, for kernels that need them,
// `modules/NN-name.ko` in loading order. The kernel's command line says what to make:
//   rorqual.layers=N      disks with serial numbers layer0 (lowest) .. layerN-1, EROFS
//   rorqual.disk=BYTES    size of the memory file system that takes what is written
//   rorqual.processes=N   processes and threads beside those that run now
//   rorqual.read_only=1   root read-only, memory file systems where a program must write
//   rorqual.vsock=PORT    the agent listens there, and has no line of its own; disks have no serial
//                         numbers: the Nth is layerN
// Commands see neither the disks nor the agent's line: the device directory is made here.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { MAX_LAYERS = 24 };

static char command_line[4096];

// PID 1 that leaves makes the kernel panic and, as it is told to, end the machine.
static _Noreturn void fail(const char *what, const char *on) {
    dprintf(1, "init: %s %s: %s\n", what, on, strerror(errno));
    _exit(1);
}

static void make(const char *path, mode_t mode) {
    if (mkdir(path, mode) < 0 && errno != EEXIST) fail("mkdir", path);
}

static void attach(const char *source, const char *at, const char *kind, unsigned long flags,
                   const char *options) {
    if (mount(source, at, kind, flags, options) < 0) fail("mount", at);
}

static long long setting(const char *name, long long otherwise) {
    char wanted[64];
    snprintf(wanted, sizeof wanted, "rorqual.%s=", name);
    const char *found = strstr(command_line, wanted);
    return found ? atoll(found + strlen(wanted)) : otherwise;
}

static ssize_t read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    return n;
}

static void load_modules(void) {
    struct dirent **names;
    int count = scandir("/modules", &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[300];
        if (names[i]->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            fail("load", path);
        close(fd);
    }
}

// Devices appear a little after their driver.
static bool find_disk(int number, char *path, size_t size) {
    char wanted[16];
    snprintf(wanted, sizeof wanted, "layer%d", number);
    if (setting("vsock", 0)) {
        snprintf(path, size, "/dev/vd%c", 'a' + number);
        for (int tries = 0; tries < 500; tries++, usleep(10000))
            if (access(path, F_OK) == 0) return true;
        return false;
    }
    for (int tries = 0; tries < 500; tries++, usleep(10000)) {
        DIR *blocks = opendir("/sys/block");
        for (struct dirent *e; blocks && (e = readdir(blocks));) {
            char file[300], serial[32];
            snprintf(file, sizeof file, "/sys/block/%s/serial", e->d_name);
            if (read_text(file, serial, sizeof serial) <= 0) continue;
            serial[strcspn(serial, "\n")] = 0;
            if (strcmp(serial, wanted)) continue;
            snprintf(path, size, "/dev/%s", e->d_name);
            closedir(blocks);
            return true;
        }
        if (blocks) closedir(blocks);
    }
    return false;
}

static void make_root(void) {
    char lower[64 * MAX_LAYERS] = "", options[64 * MAX_LAYERS + 128], disk[300];
    int layers = (int)setting("layers", 0);
    if (layers < 1 || layers > MAX_LAYERS) errno = EINVAL, fail("layers", command_line);
    for (int i = 0; i < layers; i++) {
        char at[32], longer[sizeof lower];
        snprintf(at, sizeof at, "/layer%d", i);
        make(at, 0755);
        if (!find_disk(i, disk, sizeof disk)) errno = ENODEV, fail("find", at);
        attach(disk, at, "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL);
        snprintf(longer, sizeof longer, "%s%s%s", at, *lower ? ":" : "", lower);
        strcpy(lower, longer);  // overlay wants the topmost first
    }
    make("/disk", 0755);
    snprintf(options, sizeof options, "size=%lld,nr_inodes=1000000,mode=755",
             setting("disk", 64ll << 20));
    attach("disk", "/disk", "tmpfs", MS_NODEV | MS_NOSUID, options);
    make("/disk/upper", 0755), make("/disk/work", 0755), make("/root", 0755);
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=/disk/upper,workdir=/disk/work", lower);
    attach("root", "/root", "overlay", MS_NODEV | MS_NOSUID, options);
    static const char *const needed[] = {"dev", "proc", "run", "root", "etc", "var"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        snprintf(options, sizeof options, "/root/%s", needed[i]);
        make(options, 0755);
    }
    static const char *const open_to_all[] = {"tmp", "var/tmp", "workspace"};
    for (size_t i = 0; i < sizeof open_to_all / sizeof *open_to_all; i++) {
        snprintf(options, sizeof options, "/root/%s", open_to_all[i]);
        make(options, 01777);
        chmod(options, 01777);
    }
}

static void node(const char *name, int major, int minor) {
    char path[64];
    snprintf(path, sizeof path, "/root/dev/%s", name);
    if (mknod(path, S_IFCHR | 0666, makedev((unsigned)major, (unsigned)minor)) < 0) fail("mknod", path);
    chmod(path, 0666);
}

static void make_devices(void) {
    attach("dev", "/root/dev", "tmpfs", MS_NOSUID, "size=1m,mode=755");
    node("null", 1, 3), node("zero", 1, 5), node("full", 1, 7);
    node("random", 1, 8), node("urandom", 1, 9), node("tty", 5, 0);
    make("/root/dev/pts", 0755), make("/root/dev/shm", 01777);
    attach("pts", "/root/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620");
    attach("shm", "/root/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=1777");
    static const char *const links[][2] = {{"pts/ptmx", "ptmx"},         {"/proc/self/fd", "fd"},
                                           {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
                                           {"/proc/self/fd/2", "stderr"}};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        char path[64];
        snprintf(path, sizeof path, "/root/dev/%s", links[i][1]);
        if (symlink(links[i][0], path) < 0) fail("symlink", path);
    }
    if (setting("vsock", 0)) return;
    // The line has one opener at a time: once the agent holds it, nobody else can.
    struct stat port;
    for (int tries = 0; stat("/dev/vport0p1", &port) < 0; tries++, usleep(10000))
        if (tries == 500) fail("find", "the agent's line");
    if (mknod("/root/dev/agent", S_IFCHR | 0600, port.st_rdev) < 0) fail("mknod", "agent");
}

static void set_kernel(const char *name, const char *value) {
    char path[128];
    snprintf(path, sizeof path, "/root/proc/sys/%s", name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0) fail("write", path);
    close(fd);
}

static void protect_kernel_files(void) {
    attach("proc", "/root/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    char most[32];
    struct sysinfo now;
    sysinfo(&now);
    snprintf(most, sizeof most, "%lld", setting("processes", 256) + now.procs);
    set_kernel("kernel/threads-max", most);
    // A program that asks for too much is killed, as in a container, and not refused by a guess.
    set_kernel("vm/overcommit_memory", "1");
    static const char *const read_only[] = {"bus", "fs", "irq", "sys", "sysrq-trigger", "driver"};
    for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++) {
        char path[64];
        snprintf(path, sizeof path, "/root/proc/%s", read_only[i]);
        if (access(path, F_OK) < 0) continue;
        attach(path, path, NULL, MS_BIND, NULL);
        attach(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    }
}

static void make_read_only(void) {
    static const char *const writable[] = {"/root/tmp", "/root/run", "/root/workspace", "/root/root",
                                           "/root/var/tmp"};
    char options[64];
    snprintf(options, sizeof options, "mode=1777,size=%lld", setting("disk", 64ll << 20) / 5);
    for (size_t i = 0; i < sizeof writable / sizeof *writable; i++)
        attach("tmp", writable[i], "tmpfs", MS_NOSUID | MS_NODEV, options);
    // A fork gets an identity of its own, so this one file stays writable.
    const char *id = "/root/etc/machine-id", *own = "/root/run/machine-id";
    int a = open(id, O_WRONLY | O_CREAT | O_CLOEXEC, 0444), b = open(own, O_WRONLY | O_CREAT | O_CLOEXEC, 0444);
    if (a < 0 || b < 0) fail("create", id);
    close(a), close(b);
    attach(own, id, NULL, MS_BIND, NULL);
    attach(NULL, "/root", NULL, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL);
}

int main(void) {
    make("/dev", 0755), make("/proc", 0755), make("/sys", 0755);
    attach("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++) dup2(console, fd);
    if (console > 2) close(console);
    attach("proc", "/proc", "proc", 0, NULL);
    attach("sys", "/sys", "sysfs", 0, NULL);
    if (read_text("/proc/cmdline", command_line, sizeof command_line) < 0) fail("read", "/proc/cmdline");
    load_modules();
    make_root();
    make_devices();
    protect_kernel_files();
    if (setting("read_only", 0)) make_read_only();
    int agent = open("/agent", O_RDONLY | O_CLOEXEC);
    if (agent < 0) fail("open", "/agent");
    umount2("/sys", MNT_DETACH), umount2("/proc", MNT_DETACH), umount2("/dev", MNT_DETACH);
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0)
        fail("enter", "/root");
    char port[16];
    snprintf(port, sizeof port, "%lld", setting("vsock", 0));
    char *by_line[] = {"agent", "--device", "/dev/agent", NULL};
    char *by_socket[] = {"agent", "--vsock", port, "--linger", "-1", NULL};
    char **arguments = setting("vsock", 0) ? by_socket : by_line;
    char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    fexecve(agent, arguments, environment);
    fail("run", "the agent");
}
