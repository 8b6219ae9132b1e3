// The one program of the test image: sandbox, server and client of the tests of the node.
// Static, because its image has nothing else in it.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	switch word := append(os.Args, "pause")[1]; word {
	case "pause": // until a signal
		<-stop
	case "serve": // serve ADDRESS TEXT
		go http.ListenAndServe(os.Args[2], http.HandlerFunc(
			func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, os.Args[3]) }))
		fmt.Println("serving")
		<-stop
		os.Exit(143)
	case "get": // get HOST URL: resolves the one, then fetches the other, for half a minute
		for until := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
			if err := get(os.Args[2], os.Args[3]); err == nil {
				return
			} else if time.Now().After(until) {
				fmt.Println(err)
				os.Exit(1)
			}
		}
	default:
		fmt.Println("unknown word", word)
		os.Exit(64)
	}
}

func get(host, url string) error {
	addresses, err := net.LookupHost(host)
	if err != nil {
		return err
	}
	client := http.Client{Timeout: 2 * time.Second}
	answer, err := client.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	fmt.Println(addresses, string(text))
	return err
}
