// File and port operations, run in a confined child like any command: `read`, `write`, `list`,
// `mkdir`, `remove`, `connect`, `accept`. Each answers on stdout and exits with 0 or an errno.
//
// They run inside the sandbox's own mount and network namespaces, so a path or a link can name
// nothing outside. Nothing here parses what the sandbox's files contain.
#pragma once

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static int write_all(int fd, const void *data, size_t size) {
    const char *p = data;
    while (size) {
        ssize_t n = write(fd, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        p += n;
        size -= (size_t)n;
    }
    return 0;
}

static int copy_until_end(int from, int to) {
    char buffer[65536];
    for (;;) {
        ssize_t n = read(from, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : 0;
        if (write_all(to, buffer, (size_t)n) < 0) return errno;
    }
}

static int make_directories(const char *path, int with_last) {
    char copy[4096];
    if (strlen(path) >= sizeof copy) return ENAMETOOLONG;
    strcpy(copy, path);
    for (char *p = copy + 1; *p; p++) {
        if (*p != '/') continue;
        *p = 0;
        if (mkdir(copy, 0755) < 0 && errno != EEXIST) return errno;
        *p = '/';
    }
    if (!with_last) return 0;
    if (mkdir(copy, 0755) == 0) return 0;
    struct stat st;
    if (errno == EEXIST && stat(copy, &st) == 0 && S_ISDIR(st.st_mode)) return 0;
    return errno;
}

// Regular files only: a device or a pipe would never end.
static int read_file(const char *path) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0) return errno;
    if (S_ISDIR(st.st_mode)) return EISDIR;
    if (!S_ISREG(st.st_mode)) return EINVAL;
    return copy_until_end(fd, STDOUT_FILENO);
}

static int write_file(const char *path, mode_t mode, int append) {
    int error = make_directories(path, 0);
    if (error) return error;
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | (append ? O_APPEND : O_TRUNC);
    int fd = open(path, flags, mode);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0) return errno;
    if (!S_ISREG(st.st_mode)) return EINVAL;
    if (!append && fchmod(fd, mode) < 0) return errno;
    error = copy_until_end(STDIN_FILENO, fd);
    if (!error && close(fd) < 0) error = errno;
    return error;
}

// One record: type, mode u32, size u64, mtime ns i64, length-prefixed (u16) name and link target.
static int print_entry(const char *path, const char *name) {
    struct stat st;
    if (lstat(path, &st) < 0) return errno == ENOENT ? 0 : errno;  // gone meanwhile
    char target[4096];
    uint16_t target_size = 0;
    if (S_ISLNK(st.st_mode)) {
        ssize_t n = readlink(path, target, sizeof target);
        target_size = n > 0 ? (uint16_t)n : 0;
    }
    char type = S_ISREG(st.st_mode)   ? 'f'
                : S_ISDIR(st.st_mode) ? 'd'
                : S_ISLNK(st.st_mode) ? 'l'
                                      : 'o';
    uint32_t mode = st.st_mode & 07777;
    uint64_t size = (uint64_t)st.st_size;
    int64_t mtime = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
    uint16_t name_size = (uint16_t)strlen(name);
    fwrite(&type, 1, 1, stdout);
    fwrite(&mode, 4, 1, stdout);
    fwrite(&size, 8, 1, stdout);
    fwrite(&mtime, 8, 1, stdout);
    fwrite(&name_size, 2, 1, stdout);
    fwrite(name, 1, name_size, stdout);
    fwrite(&target_size, 2, 1, stdout);
    fwrite(target, 1, target_size, stdout);
    return 0;
}

static int list_directory(const char *path) {
    struct stat st;
    if (stat(path, &st) < 0) return errno;
    int error = 0;
    if (!S_ISDIR(st.st_mode)) {
        error = print_entry(path, "");
    } else {
        DIR *directory = opendir(path);
        if (!directory) return errno;
        char child[8192];
        for (struct dirent *entry; !error && (entry = readdir(directory));) {
            if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
            snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
            error = print_entry(child, entry->d_name);
        }
        closedir(directory);
    }
    if (fflush(stdout) != 0 && !error) error = errno;
    return error;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)kind, (void)at;
    return remove(path) < 0 ? errno : 0;
}

static int remove_tree(const char *path) {
    struct stat st;
    if (lstat(path, &st) < 0) return errno;
    int result = nftw(path, remove_one, 32, FTW_DEPTH | FTW_PHYS);
    return result < 0 ? errno : result;
}

// Copy both ways until both ends are done; each end closes on its own.
static int relay(int sock) {
    struct pollfd fds[2] = {{STDIN_FILENO, POLLIN, 0}, {sock, POLLIN, 0}};
    char buffer[65536];
    while (fds[0].fd >= 0 || fds[1].fd >= 0) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR) return errno;
        for (int i = 0; i < 2; i++) {
            if (fds[i].fd < 0 || !fds[i].revents) continue;
            ssize_t n = read(fds[i].fd, buffer, sizeof buffer);
            int to = i == 0 ? sock : STDOUT_FILENO;
            if (n > 0 && write_all(to, buffer, (size_t)n) == 0) continue;
            if (i == 0) shutdown(sock, SHUT_WR);
            else close(STDOUT_FILENO);
            fds[i].fd = -1;
            if (i == 1) return 0;  // the port closed: what the host still sends has no reader
        }
    }
    return 0;
}

static int connect_port(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address) < 0) return errno;
    return relay(sock);
}

// Wait for one connection on a listening socket; one byte on stdout tells that it came.
static int accept_port(int listener) {
    int sock;
    do sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    while (sock < 0 && errno == EINTR);
    if (sock < 0 || write_all(STDOUT_FILENO, "+", 1) < 0) return errno;
    return relay(sock);
}

static int run_builtin(const char *name, char **argv, int argc, int listener) {
    umask(022);
    if (!strcmp(name, "read") && argc == 1) return read_file(argv[0]);
    if (!strcmp(name, "write") && argc == 3)
        return write_file(argv[0], (mode_t)strtol(argv[1], NULL, 8), argv[2][0] == 'a');
    if (!strcmp(name, "list") && argc == 1) return list_directory(argv[0]);
    if (!strcmp(name, "mkdir") && argc == 1) return make_directories(argv[0], 1);
    if (!strcmp(name, "remove") && argc == 1) return remove_tree(argv[0]);
    if (!strcmp(name, "connect") && argc == 1) return connect_port(atoi(argv[0]));
    if (!strcmp(name, "accept") && argc == 1) return accept_port(listener);
    return ENOSYS;
}
