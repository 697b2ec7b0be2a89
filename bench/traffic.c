/* Traffic for the switches: the same few lines of C push through each of them.
 *
 *   traffic tcp-sink PORT                      -> bits a second
 *   traffic tcp-source ADDRESS PORT MILLISECONDS
 *   traffic udp-sink PORT                      -> datagrams a second, as received
 *   traffic udp-source ADDRESS PORT SIZE MILLISECONDS
 *   traffic ping ADDRESS COUNT                 -> round trip p50 and p99, nanoseconds
 *
 * A sink prints "ready" once it listens, and ends when its source does (UDP: a datagram
 * of one byte, sent several times). Ping sends one echo request, waits for the reply and
 * sends the next; it needs CAP_NET_RAW.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/ip_icmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 256 * 1024, GOODBYES = 20 };

static char chunk[CHUNK];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct sockaddr_in address(const char *host, const char *port)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(port))};

    if (inet_pton(AF_INET, host, &to.sin_addr) != 1)
        fail(host);
    return to;
}

static int open_socket(int type, int protocol, int seconds)
{
    struct timeval patience = {.tv_sec = seconds};
    int fd = socket(AF_INET, type, protocol), yes = 1;

    if (fd < 0)
        fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    return fd;
}

static int open_sink(int type, const char *port)
{
    struct sockaddr_in any = address("0.0.0.0", port);
    int fd = open_socket(type, 0, 10);

    if (bind(fd, (struct sockaddr *)&any, sizeof(any)) ||
        (type == SOCK_STREAM && listen(fd, 1)))
        fail("bind");
    puts("ready");
    fflush(stdout);
    return fd;
}

static void tcp_sink(const char *port)
{
    int fd = accept(open_sink(SOCK_STREAM, port), NULL, NULL);
    uint64_t bytes = 0, begin = now_ns();
    ssize_t got;

    if (fd < 0)
        fail("accept");
    while ((got = read(fd, chunk, sizeof(chunk))) > 0)
        bytes += (uint64_t)got;
    if (got < 0)
        fail("read");
    printf("%.0f\n", (double)bytes * 8e9 / (double)(now_ns() - begin));
}

static void tcp_source(const char *host, const char *port, uint64_t ms)
{
    struct sockaddr_in to = address(host, port);
    int fd = open_socket(SOCK_STREAM, 0, 10);
    uint64_t until;

    if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
        fail("connect");
    until = now_ns() + ms * 1000000u;
    while (now_ns() < until) {
        if (write(fd, chunk, sizeof(chunk)) < 0)
            fail("write");
    }
    close(fd);
}

static void udp_sink(const char *port)
{
    int fd = open_sink(SOCK_DGRAM, port);
    uint64_t count = 0, begin = 0, last = 0;
    ssize_t got;

    while ((got = recv(fd, chunk, sizeof(chunk), 0)) != 1) {
        if (got < 0)
            fail("recv");
        last = now_ns();
        if (count++ == 0)
            begin = last;
    }
    printf("%.0f\n", count > 1 ? (double)(count - 1) * 1e9 / (double)(last - begin) : 0);
}

static void udp_source(const char *host, const char *port, size_t size, uint64_t ms)
{
    struct sockaddr_in to = address(host, port);
    int fd = open_socket(SOCK_DGRAM, 0, 10);
    uint64_t until = now_ns() + ms * 1000000u;

    if (size > sizeof(chunk) || connect(fd, (struct sockaddr *)&to, sizeof(to)))
        fail("connect");
    while (now_ns() < until)
        (void)!send(fd, chunk, size, 0); /* a full queue drops, as on a wire */
    for (int i = 0; i < GOODBYES; i++) {
        usleep(10000);
        (void)!send(fd, chunk, 1, 0);
    }
}

static uint16_t checksum(const void *data, size_t size)
{
    const uint16_t *words = data;
    uint32_t sum = 0;

    for (size_t i = 0; i < size / 2; i++)
        sum += words[i];
    sum = (sum >> 16) + (sum & 0xffff);
    return (uint16_t)~(sum + (sum >> 16));
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Nanoseconds to the reply with our number, or 0 if none came. */
static uint64_t ping_once(int fd, const struct sockaddr_in *to, uint16_t number)
{
    struct {
        struct icmphdr head;
        char data[56];
    } request = {.head = {.type = ICMP_ECHO}};
    uint16_t id = htons((uint16_t)getpid());
    uint64_t begin = now_ns();
    char reply[256];

    request.head.un.echo.id = id;
    request.head.un.echo.sequence = number;
    request.head.checksum = checksum(&request, sizeof(request));
    if (sendto(fd, &request, sizeof(request), 0, (const void *)to, sizeof(*to)) < 0)
        return 0;
    for (;;) {
        ssize_t got = recv(fd, reply, sizeof(reply), 0);
        const struct icmphdr *head = (const void *)(reply + 20);

        if (got < 28)
            return 0;
        if (head->type == ICMP_ECHOREPLY && head->un.echo.id == id &&
            head->un.echo.sequence == number)
            return now_ns() - begin;
    }
}

static void ping(const char *host, size_t count)
{
    struct sockaddr_in to = address(host, "0");
    uint64_t *took = calloc(count + 1, sizeof(*took));
    int fd = open_socket(SOCK_RAW, IPPROTO_ICMP, 1);
    size_t replies = 0;

    for (size_t i = 0; took && i < count; i++) {
        took[replies] = ping_once(fd, &to, (uint16_t)i);
        replies += took[replies] != 0;
    }
    if (replies < count / 2 || replies == 0)
        fail("ping");
    qsort(took, replies, sizeof(*took), ascending);
    printf("%llu %llu\n", (unsigned long long)took[replies / 2],
           (unsigned long long)took[replies * 99 / 100]);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";

    if (argc == 3 && !strcmp(what, "tcp-sink"))
        tcp_sink(argv[2]);
    else if (argc == 5 && !strcmp(what, "tcp-source"))
        tcp_source(argv[2], argv[3], strtoul(argv[4], 0, 0));
    else if (argc == 3 && !strcmp(what, "udp-sink"))
        udp_sink(argv[2]);
    else if (argc == 6 && !strcmp(what, "udp-source"))
        udp_source(argv[2], argv[3], strtoul(argv[4], 0, 0), strtoul(argv[5], 0, 0));
    else if (argc == 4 && !strcmp(what, "ping"))
        ping(argv[2], strtoul(argv[3], 0, 0));
    else
        return 2;
    return 0;
}
